"""Tokenizers: text to ids and back, segment by segment.

A prompt is tokenized as the concatenation of its segments' ids, so that a token never spans two segments
and a state's ids are a prefix of every later state's ids.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import sentencepiece

from jraggym.errors import InputError
from jraggym.text.rendering import MARKERS


class Tokenizer(Protocol):
    """What the rest of jraggym needs of a tokenizer."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def pad_id(self) -> int: ...
    def token_id(self, piece: str) -> int: ...
    def encode(self, segments: Sequence[str]) -> list[list[int]]: ...
    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]: ...


class SentencePieceTokenizer:
    """A SentencePiece model in which every marker of the prompt format, or what else was asked for, is one token."""

    def __init__(self, model: bytes):
        self.model = model
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self._kept: dict[str, list[int]] = {}  # the same documents and questions come again and again

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, symbols: Sequence[str] = MARKERS) -> SentencePieceTokenizer:
        """Fits byte-pair encoding (with byte fallback) on `texts`, `symbols` among at most `vocab_size` pieces."""
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            hard_vocab_limit=False,
            byte_fallback=True,
            user_defined_symbols=list(symbols),
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            pad_id=0,
            unk_id=1,
            bos_id=-1,
            eos_id=-1,
            num_threads=2,
            minloglevel=2,
        )
        return cls(model.getvalue())

    @classmethod
    def load(cls, path: Path) -> SentencePieceTokenizer:
        """Reads a model file; InputError when it is missing or no SentencePiece model."""
        try:
            model = Path(path).read_bytes()
            if not model:  # SentencePiece takes no bytes for no model, and loads nothing
                raise RuntimeError("an empty file")
            return cls(model)
        except (OSError, RuntimeError) as error:
            raise InputError(
                f"cannot read the tokenizer {path}", got=error, remedy="Give a SentencePiece model."
            ) from None

    @property
    def vocab_size(self) -> int:
        return self._processor.get_piece_size()

    @property
    def pad_id(self) -> int:
        return self._processor.pad_id()

    def token_id(self, piece: str) -> int:
        """The id of a marker; KeyError when it is not one token."""
        found = self._processor.piece_to_id(piece)
        if found == self._processor.unk_id():
            raise KeyError(piece)
        return found

    def encode(self, segments: Sequence[str]) -> list[list[int]]:
        """Ids of each segment."""
        new = [segment for segment in dict.fromkeys(segments) if segment not in self._kept]
        self._kept.update((segment, self._processor.encode(segment)) for segment in new)
        return [self._kept[segment] for segment in segments]

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """Text of each id sequence; ids outside the vocabulary are dropped."""
        size = self.vocab_size
        return [self._processor.decode([int(i) for i in row if 0 <= i < size]) for row in np_rows(ids)]


def np_rows(ids: Sequence[Sequence[int]]) -> list[list[int]]:
    return ids.tolist() if isinstance(ids, np.ndarray) else [list(row) for row in ids]
