"""Token-exact transcripts: the ids of an episode as the model was fed them, and who wrote each.

    ids       5  9  2 | 31  7  8 | 60 61 62 | 31  4  3
    segment   PROMPT  |  MODEL   | OBSERV.  |  MODEL        every mask derives from this line
    turn      0  0  0 |  0  0  0 |  0  0  0 |  1  1  1
    logprob   0  0  0 | -1 -.2 0 |  0  0  0 | -.5 ...       of the policy that drew the token

Ids are only ever appended; nothing is decoded and tokenised again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from jraggym.errors import InputError
from jraggym.types import Piece, Segment

RESPONSE = (Segment.MODEL, Segment.OBSERVATION, Segment.INVALID, Segment.FORCED)  # what stands behind a prompt
_ROUNDING = 1e-4  # a log-softmax in float32 may end a little above 0


@dataclass(frozen=True, slots=True)
class Masks:
    """Which tokens each part of an objective reads; every field bool, of the shape of the segments."""

    loss: np.ndarray
    kl: np.ndarray
    entropy: np.ndarray
    value: np.ndarray  # the value function's loss
    whitening: np.ndarray  # mean and variance of advantages


def masks(segment: Any, leaky: bool = False) -> Masks:
    """The masks of segments [...]: the policy's own tokens alone (Search-R1, arXiv 2503.09516, section 3.1).

    With `leaky`, value and whitening read every token behind the prompt, as Search-R1's published PPO does.
    """
    segment = np.asarray(segment)
    own = segment == Segment.MODEL
    wide = np.isin(segment, RESPONSE) if leaky else own
    return Masks(loss=own, kl=own, entropy=own, value=wide, whitening=wide)


@dataclass(frozen=True, slots=True, eq=False)
class Transcript:
    """An episode of T tokens; the arrays are read-only. Raises InputError for what cannot be one."""

    ids: np.ndarray  # int32 [T]
    segment: np.ndarray  # int8 [T], see Segment
    turn: np.ndarray  # int16 [T]  the model's turn that a token belongs to, from 0; the prompt's is 0
    logprob: np.ndarray  # f32 [T]  behaviour log-probability in nats, 0 where nothing was drawn

    def __post_init__(self) -> None:
        for name, dtype in (("ids", np.int32), ("segment", np.int8), ("turn", np.int16), ("logprob", np.float32)):
            array = np.array(getattr(self, name), dtype)
            array.setflags(write=False)
            object.__setattr__(self, name, array)
        if self.ids.ndim != 1 or len({getattr(self, f.name).shape for f in fields(self)}) > 1:
            shapes = ", ".join(f"{f.name} {getattr(self, f.name).shape}" for f in fields(self))
            raise InputError("a transcript is four vectors of one length", got=shapes, remedy="One value a token.")
        if fault := self._fault():
            raise InputError(fault, got=f"{len(self)} tokens", remedy="Append segments in the order of the episode.")

    def _fault(self) -> str | None:
        own, prompt = self.segment == Segment.MODEL, self.segment == Segment.PROMPT
        later = np.isin(self.segment, RESPONSE)
        if not np.isin(self.segment, list(Segment)).all():
            return "there is no such segment"
        if (np.cumsum(later) > 0)[prompt].any():
            return "a prompt stands at the start"
        drawn = self.logprob[own]
        if (self.logprob[~own] != 0).any() or not np.isfinite(drawn).all() or (drawn > _ROUNDING).any():
            return "log-probabilities are finite and at most 0, and 0 where no model drew the token"
        if (np.diff(self.turn[self.segment != Segment.PAD]) < 0).any():
            return "turns only grow"
        return None

    @classmethod
    def start(cls, prompt: Sequence[int]) -> Transcript:
        """A transcript that holds a prompt and nothing else."""
        return cls(*(np.zeros(0, np.int32) for _ in fields(cls))).append(prompt, Segment.PROMPT, 0)

    def __len__(self) -> int:
        return len(self.ids)

    def append(
        self, ids: Sequence[int], segment: Segment, turn: int, logprob: Sequence[float] | None = None
    ) -> Transcript:
        """The transcript with `ids` behind it; those it has stay as they are.

        Args: logprob: of each id, in nats, where the model drew them. Raises InputError as the class does.
        """
        more = np.zeros(len(ids)) if logprob is None else logprob
        return Transcript(
            np.concatenate([self.ids, np.asarray(ids, np.int32)]),
            np.concatenate([self.segment, np.full(len(ids), segment, np.int8)]),
            np.concatenate([self.turn, np.full(len(ids), turn, np.int16)]),
            np.concatenate([self.logprob, np.asarray(more, np.float32)]),
        )

    def masks(self, leaky: bool = False) -> Masks:
        """The masks [T], see `masks`."""
        return masks(self.segment, leaky)

    @property
    def prompt(self) -> np.ndarray:
        """int32: ids of the prompt, padding left out."""
        return self.ids[self.segment == Segment.PROMPT]

    @property
    def response(self) -> Transcript:
        """All that stands behind the prompt, padding left out."""
        return self._where(np.isin(self.segment, RESPONSE))

    def pieces(
        self, decode: Callable[[Sequence[Sequence[int]]], list[str]], silent: Collection[int] = ()
    ) -> tuple[Piece, ...]:
        """The text of each run of tokens that have one segment and one turn, padding left out.

        Args: decode: a tokenizer's; silent: ids that are no text, such as the one that ends a model's turn.
        """
        real = self._where(self.segment != Segment.PAD)
        if not len(real):
            return ()
        change = (np.diff(real.segment) != 0) | (np.diff(real.turn) != 0)
        starts = [0, *(np.flatnonzero(change) + 1).tolist()]
        runs = [run.tolist() for run in np.split(real.ids, starts[1:])]
        texts = decode([[i for i in run if i not in silent] for run in runs])
        return tuple((Segment(int(real.segment[s])), text) for s, text in zip(starts, texts, strict=True))

    def _where(self, keep: np.ndarray) -> Transcript:
        return Transcript(self.ids[keep], self.segment[keep], self.turn[keep], self.logprob[keep])
