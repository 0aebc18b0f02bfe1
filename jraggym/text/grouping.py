"""From K transcripts of one question to one row of a batch: the prompt once, the responses as its candidates."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jraggym.errors import InputError
from jraggym.text.batching import Row
from jraggym.transcripts import Transcript
from jraggym.types import Segment


def group(
    transcripts: Sequence[Transcript],
    rewards: Sequence[float],
    turn_rewards: Sequence[Sequence[float]] | None = None,
) -> Row:
    """A row whose K candidates are the responses, token by token as they were drawn; equal ones all count.

    Args:
      rewards: [K], one for each episode.
      turn_rewards: for each episode one reward for each turn of the model, on the last token that it drew there.
    Raises: InputError when there is no transcript, or their prompts or the numbers of rewards differ.
    """
    if not transcripts or len(rewards) != len(transcripts):
        got = f"{len(transcripts)} transcripts and {len(rewards)} rewards"
        raise InputError("a group has one reward for each transcript", got=got, remedy="Give at least one of each.")
    prompt, responses = transcripts[0].prompt, [transcript.response for transcript in transcripts]
    if not all(np.array_equal(prompt, transcript.prompt) for transcript in transcripts):
        raise InputError("a group shares its prompt", got="different prompts", remedy="Group episodes by question.")
    steps = None
    if turn_rewards is not None:
        steps = [_on_last_tokens(r, given) for r, given in zip(responses, turn_rewards, strict=True)]
    return Row(
        prompt=prompt.tolist(),
        actions=[response.ids.tolist() for response in responses],
        loss_masks=[response.masks().loss.tolist() for response in responses],
        rewards=list(rewards),
        distinct=[True] * len(responses),
        logprobs=[response.logprob.tolist() for response in responses],
        step_rewards=steps,
    )


def _on_last_tokens(response: Transcript, rewards: Sequence[float]) -> list[float]:
    own = response.segment == Segment.MODEL
    turns = sorted(set(response.turn[own].tolist()))
    if len(rewards) != len(turns):
        got = f"{len(rewards)} rewards and {len(turns)} turns"
        raise InputError("every turn of the model has one reward", got=got, remedy="Give one for each.")
    placed = [0.0] * len(response)
    for turn, reward in zip(turns, rewards, strict=True):
        placed[int(np.flatnonzero(own & (response.turn == turn))[-1])] = reward
    return placed
