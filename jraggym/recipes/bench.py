"""What training takes, whatever the data: settings, a tokenizer, a folder; and the rows of recorded candidates."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np

from jraggym.checkpoint import Checkpointer
from jraggym.data.lazy import Items, Lazy
from jraggym.data.process import ProcessRecord
from jraggym.errors import InputError
from jraggym.hosts import surveyed
from jraggym.models.decoder import DecoderConfig
from jraggym.recipes.settings import Settings
from jraggym.text.batching import Codec, Row
from jraggym.text.chat import ChatCodec, chat_row, reply_ids
from jraggym.text.huggingface import HuggingFaceTokenizer
from jraggym.text.tokenizer import SentencePieceTokenizer
from jraggym.training import Run, fit
from jraggym.types import Candidate

KEPT = 1 << 16  # rows of stored records that are not read again
Progress = Callable[[str, int, int, Mapping[str, Any] | None], None]  # (stage, done, total, metrics)


@dataclass(frozen=True)
class Bench:
    """What training shares: the settings, the tokenizer, where results lie, and who is told."""

    settings: Settings
    tokenizer: SentencePieceTokenizer | HuggingFaceTokenizer
    out: Path
    progress: Progress

    @property
    def config(self) -> DecoderConfig:
        return self.settings.model

    @property
    def codec(self) -> Codec:
        limits = self.settings.max_turns, self.settings.max_prompt
        if isinstance(self.tokenizer, HuggingFaceTokenizer):
            return ChatCodec(self.tokenizer, *limits)
        return Codec(self.tokenizer, *limits)

    def key(self, name: str) -> jax.Array:
        """The random key of a stage; stages do not share randomness."""
        return jax.random.fold_in(jax.random.key(self.settings.seed), random.Random(name).getrandbits(31))

    def fit(self, name: str, weights: Any, run: Run) -> Any:
        """Trains one model under `out`/checkpoints/`name`, resumably."""
        total = run.optimization.steps
        saved = Checkpointer(self.out / "checkpoints" / name, keep=1)
        return fit(run, weights, saved, report=lambda step, metrics: self.progress(name, step, total, metrics))


def candidate_ids(codec: Codec, record: ProcessRecord, texts: Sequence[str]) -> list[list[int]]:
    """Ids of candidates of a record: actions in tags, or replies in a chat."""
    return codec.encode(texts) if record.messages is None else reply_ids(_chat(codec), texts)


def usable(shop: Bench, record: ProcessRecord) -> list[Candidate]:
    """The record's candidates of 1 to `max_action` tokens; a garbled output can be longer than when it was sampled."""
    ids = candidate_ids(shop.codec, record, [c.text for c in record.candidates])
    return [c for c, i in zip(record.candidates, ids, strict=True) if 0 < len(i) <= shop.settings.max_action]


def stored_rows(records: Items[ProcessRecord], make: Callable[[ProcessRecord], Row | None]) -> Items[Row]:
    """The rows that records give, without those that give None; each is read and tokenised when it is asked for.

    Which records give a row the processes of a job find out together, each for its own share of the records.
    """
    made = functools.lru_cache(maxsize=KEPT)(lambda i: make(records[i]))
    useful = [i for i, some in enumerate(surveyed(len(records), lambda i: made(i) is not None)) if some]
    return Lazy(len(useful), lambda i: cast(Row, made(useful[i])))


def left_out(shop: Bench, records: Items[ProcessRecord]) -> dict[str, Any]:
    """For a job's results: how many candidates do not fit `max_action`, where there is any."""

    def look(i: int) -> tuple[int, int]:
        record = records[i]
        return len(record.candidates), len(usable(shop, record))

    total, kept = np.sum([(0, 0), *surveyed(len(records), look)], axis=0).tolist()
    why = f"of {total}; they have no token, or more than --settings.max-action {shop.settings.max_action}"
    return {"candidates_left_out": f"{total - kept} {why}"} if kept < total else {}


def record_row(codec: Codec, record: ProcessRecord, texts: Sequence[str], rewards: Sequence[float | None]) -> Row:
    """A record with some of its candidates. A chat is rendered as a critic that scores replies renders it.

    Raises InputError for a chat that is longer than the codec's `max_prompt`, and for a model without a chat template.
    """
    if record.messages is None:
        return codec.row(record.state, texts, rewards)
    row = chat_row(_chat(codec), record.messages, texts, rewards)
    if len(row.prompt) > codec.max_prompt:
        got = f"{len(row.prompt)} > {codec.max_prompt} in record {record.id!r}"
        raise InputError("a chat does not fit max_prompt", got=got, remedy="Raise --settings.max-prompt.")
    return row


def _chat(codec: Codec) -> HuggingFaceTokenizer:
    if not isinstance(codec, ChatCodec):
        remedy = "Use an instruction-tuned model of a Hugging Face folder."
        raise InputError("the data are chats, and the model has no chat template", got="none", remedy=remedy)
    return codec.tokenizer
