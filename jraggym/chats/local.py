"""A chat model on this machine's devices: our decoder with a tokenizer's own chat template.

Prompts are padded to a power of two, and a batch always has the same number of rows: each width is compiled once, and
a completion depends on its request and not on the batch.
"""

from __future__ import annotations

import functools
import zlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jax import Array

from jraggym.chat_model import Completion, Message, Reply, Request
from jraggym.errors import InputError
from jraggym.model_folder import Model
from jraggym.models.decoder import Decoder, DecoderConfig, prefix_forward
from jraggym.preemption import stop_if_asked
from jraggym.sampling import Samples, Sampling, sample
from jraggym.text.batching import EMPTY_ROW, collate
from jraggym.text.chat import chat_ids
from jraggym.text.huggingface import HuggingFaceTokenizer


@dataclass(frozen=True)
class Local:
    """A model on this machine: a folder of ours, a Hugging Face folder, or owner/repository@revision on the hub."""

    model: str
    max_prompt: int = 4_096  # tokens
    truncate: bool = False  # a longer prompt loses its beginning; else it is an error
    rows: int = 8  # requests in a batch


class Prompts:
    """The prompts of chats as ids, of at most `max_prompt` tokens and no more than fit a model's positions."""

    def __init__(self, model: Model, max_prompt: int, truncate: bool):
        """Raises InputError when the model's tokenizer has no chat template."""
        if not isinstance(model.tokenizer, HuggingFaceTokenizer):
            remedy = "Use an instruction-tuned model of a Hugging Face folder."
            raise InputError("the model's tokenizer has no chat template", got=type(model.tokenizer), remedy=remedy)
        self.tokenizer = model.tokenizer
        self.tokenizer.chat([{"role": "user", "content": "?"}])
        self._longest, self._truncate = max_prompt, truncate
        self._positions = model.about.get("config", {}).get("max_position_embeddings")

    def ids(self, messages: Sequence[Message], room: int) -> list[int]:
        """Ids that leave room for `room` more tokens. Raises InputError for a prompt that is too long."""
        return self.fit(chat_ids(self.tokenizer, messages), room)

    def fit(self, ids: list[int], room: int) -> list[int]:
        """A prompt's ids within the limits; raises InputError as `ids` does."""
        most = self._longest
        if self._positions is not None:
            most = min(most, self._positions - room)
        if len(ids) <= most:
            return ids
        if self._truncate and most > 0:
            return ids[-most:]
        remedy = "Raise max_prompt, if the model has positions for it, or set truncate."
        raise InputError("the prompt is too long", got=f"{len(ids)} tokens for at most {most}", remedy=remedy)


def width(count: int, least: int) -> int:
    """The least power of two from `least` on that is no smaller than `count`."""
    return max(least, 1 << (count - 1).bit_length())


class LocalChat:
    """The `ChatModel` of an actor; greedy candidates are one, repeated.

    Tokens and log-probabilities include the stop; the latter are the model's own, before temperature.
    """

    def __init__(self, model: Model, *, max_prompt: int = 4_096, truncate: bool = False, rows: int = 8):
        """Args as of `Local`. Raises InputError for a model that is no actor or has no chat template."""
        if model.kind != "actor":
            raise InputError("only an actor completes chats", got=model.kind, remedy="Name an actor.")
        self._model, self._rows = model, rows
        self._prompts = Prompts(model, max_prompt, truncate)
        self._stops = np.array(self._prompts.tokenizer.end_ids, np.int32)

    def __call__(self, requests: Sequence[Request]) -> list[Reply]:
        """A prompt that is too long, and messages that the template refuses, are errors of their replies."""
        replies = [Reply()] * len(requests)
        groups: dict[tuple[int, Sampling], list[tuple[int, list[int]]]] = defaultdict(list)
        for i, request in enumerate(requests):
            try:
                sampling = Sampling(request.candidates, request.max_tokens, request.temperature)
                if request.temperature == 0.0:
                    sampling = replace(sampling, candidates=1)  # greedy ones are all alike
                ids = self._prompts.ids(request.messages, request.max_tokens)
            except InputError as error:
                replies[i] = Reply(error=str(error))
                continue
            groups[width(len(ids), 64), sampling].append((i, ids))
        for (columns, sampling), members in groups.items():
            for start in range(0, len(members), self._rows):
                stop_if_asked()
                part = members[start : start + self._rows]
                found = self._run(columns, sampling, [(ids, requests[i].seed) for i, ids in part])
                for (i, ids), completions in zip(part, found, strict=True):
                    copies = requests[i].candidates // sampling.candidates
                    replies[i] = Reply(tuple(completions * copies), len(ids))
        return replies

    def _run(self, columns: int, sampling: Sampling, prompts: list[tuple[list[int], int]]) -> list[list[Completion]]:
        """The completions of one batch of (prompt, seed)."""
        real = [replace(EMPTY_ROW, prompt=ids) for ids, _ in prompts]
        rows = real + [EMPTY_ROW] * (self._rows - len(real))
        batch = collate(rows, prompt=columns, action=1, candidates=1, pad=self._prompts.tokenizer.pad_id)
        seeds = np.zeros(self._rows, np.uint32)
        # The prompt counts too: with its seed alone, all questions would draw by the same random numbers.
        seeds[: len(real)] = [zlib.crc32(np.array([seed, *ids], np.int64).tobytes()) for ids, seed in prompts]
        active = np.arange(self._rows) < len(real)
        arguments = (batch.prompt, batch.prompt_mask, self._stops, seeds, active)
        samples = jax.device_get(_complete(self._model.weights, self._model.config, sampling, *arguments))
        return [[self._completion(samples, i, k) for k in range(sampling.candidates)] for i in range(len(real))]

    def _completion(self, samples: Any, i: int, k: int) -> Completion:
        ids = samples.tokens[i, k][samples.mask[i, k]].tolist()
        ended = ids[-1] in self._stops
        text = self._prompts.tokenizer.decode([ids[:-1] if ended else ids])[0]
        return Completion(text, len(ids), float(samples.logprob[i, k].sum()), not ended)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _complete(
    weights: Decoder,
    config: DecoderConfig,
    sampling: Sampling,
    prompt: Array,
    mask: Array,
    stops: Array,
    seeds: Array,
    active: Array,
) -> Samples:
    prefix = prefix_forward(weights, config, prompt, mask)
    return sample(weights, config, sampling, prefix, prompt[:, -1], stops, jax.vmap(jax.random.key)(seeds), active)
