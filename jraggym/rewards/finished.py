"""What a reward reads: one finished episode of a tag protocol, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jraggym.protocols.protocol import Protocol
from jraggym.types import Document, Example, Piece, Segment


@dataclass(frozen=True, slots=True)
class Finished:
    """A finished episode and its question; a prompt among the pieces is never read."""

    protocol: Protocol
    example: Example
    pieces: tuple[Piece, ...]  # as Transcript.pieces gives them, without the token that ends a turn
    ended: bool  # by the model (where the protocol needs it, with its end token), and not by a budget
    documents: tuple[tuple[Document, ...], ...] = ()  # of each search that was carried out
    may_search: bool = True  # the sample's mode, as it was dealt and not as the text looks

    @property
    def turns(self) -> tuple[str, ...]:
        """What the model wrote in each turn."""
        return self._texts(Segment.MODEL)

    @property
    def observations(self) -> tuple[str, ...]:
        """What the model was shown of each search."""
        return self._texts(Segment.OBSERVATION)

    def _texts(self, segment: Segment) -> tuple[str, ...]:
        return tuple(text for s, text in self.pieces if s == segment)


Reward = Callable[[Finished], float]
