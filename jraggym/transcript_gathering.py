"""Fresh experience from transcripts: K whole episodes of each question, a reward for each, a row for each question."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import jax
import numpy as np
from jax import Array

from jraggym.chat_model import Message
from jraggym.episodes import Retriever
from jraggym.errors import InputError
from jraggym.gathering import Gathered, draw
from jraggym.protocols.protocol import Protocol, opening, plain
from jraggym.rewards.answer import em
from jraggym.rewards.finished import Finished, Reward
from jraggym.rewards.form import valid_sequence
from jraggym.rollout import Policy
from jraggym.text.batching import Row
from jraggym.text.chat import chat_ids
from jraggym.text.grouping import group
from jraggym.text.huggingface import HuggingFaceTokenizer
from jraggym.text.tokenizer import Tokenizer
from jraggym.transcript_episode import TranscriptEpisode
from jraggym.transcript_rollout import TranscriptRollout
from jraggym.types import Example, Segment


def prompt_ids(tokenizer: Tokenizer, protocol: Protocol, question: str, may_search: bool = True) -> list[int]:
    """The ids that an episode of `protocol` starts with: by the chat template where the tokenizer has one."""
    messages: Sequence[Message] = opening(protocol, question, may_search)
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return chat_ids(tokenizer, messages)
    return tokenizer.encode([plain(messages)])[0]


def as_finished(protocol: Protocol, example: Example, episode: TranscriptEpisode) -> Finished:
    """What a reward reads of an episode."""
    return Finished(protocol, example, episode.pieces, episode.ended, episode.documents, episode.may_search)


def measures(finished: Sequence[Finished]) -> dict[str, float]:
    """Means over episodes: em, searches and turns, and the shares in good form and ended by the model."""
    values: dict[str, list[float]] = {
        "em": [em(f) for f in finished],
        "searches": [len(f.documents) for f in finished],
        "turns": [len(f.turns) for f in finished],
        "valid": [valid_sequence(f) for f in finished],
        "ended": [f.ended for f in finished],
    }
    return {name: float(np.mean(each)) for name, each in values.items()}


@dataclass(frozen=True)
class TranscriptGatherer:
    """Draws questions and runs the policy on `copies` episodes of each; a pure function of (policy, iteration).

    With `masked=False` the rows hold what searches brought as if the policy had written it: the ablation of the mask.
    The reported gap between sampler and trainer then means nothing, since nobody drew those tokens.
    A `retriever` with the same encoder replaces the rollout's own.
    """

    rollout: TranscriptRollout
    reward: Reward
    examples: Sequence[Example]
    questions: int  # of an iteration
    key: Array
    copies: int = 5
    masked: bool = True
    seed: int = 0
    retriever: Retriever | None = None

    def __post_init__(self) -> None:
        if not self.examples or min(self.questions, self.copies) < 1:
            got = f"{len(self.examples)} examples, {self.questions} questions, {self.copies} copies"
            raise InputError("there is no episode to train on", got=got, remedy="Give at least one of each.")

    def __call__(self, policy: Policy, iteration: int, report: Callable[[int], None] | None = None) -> Gathered:
        """The groups of an iteration; `report` gets the number of finished episodes, from a callback."""
        asked = [e for e in draw(self.examples, self.questions, iteration, self.seed) for _ in range(self.copies)]
        rules = self.rollout.rules
        prompts = [prompt_ids(rules.tokenizer, rules.protocol, example.question) for example in asked]
        key = jax.random.fold_in(self.key, iteration)
        episodes, work = self.rollout.run(policy.actor, asked, prompts, key, retriever=self.retriever, report=report)
        finished = [as_finished(rules.protocol, e, found) for e, found in zip(asked, episodes, strict=True)]
        rewards = [self.reward(f) for f in finished]
        starts = range(0, len(episodes), self.copies)
        rows = [self._row(episodes[i : i + self.copies], rewards[i : i + self.copies]) for i in starts]
        metrics = {f"episode_{name}": value for name, value in measures(finished).items()}
        metrics |= {
            "episode_reward": float(np.mean(rewards)),
            "mixed_groups": float(np.mean([len(set(row.rewards)) > 1 for row in rows])),  # the others teach nothing
            "utilisation": work.utilisation,
            "prefilled_tokens": float(work.prefilled),
        }
        drawn = sum(int(np.sum(episode.transcript.segment == Segment.MODEL)) for episode in episodes)
        return Gathered(rows, drawn, metrics)

    def _row(self, episodes: Sequence[TranscriptEpisode], rewards: Sequence[float]) -> Row:
        row = group([episode.transcript for episode in episodes], rewards)
        return row if self.masked else replace(row, loss_masks=[[True] * len(ids) for ids in row.actions])
