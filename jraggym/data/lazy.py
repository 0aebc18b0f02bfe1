"""Sequences whose items are read or made when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Items(Protocol[T_co]):
    """A list, a dataset on disk, a `Lazy`: whatever has items with numbers, and gives them in order."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> T_co: ...
    def __iter__(self) -> Iterator[T_co]: ...


@dataclass(frozen=True)
class Lazy(Generic[T]):
    """`length` items, of which number i, from 0, is `make(i)`."""

    length: int
    make: Callable[[int], T]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int, /) -> T:
        return self.make(range(self.length)[index])

    def __iter__(self) -> Iterator[T]:
        return map(self.make, range(self.length))


def chosen(items: Items[T], numbers: Sequence[int]) -> Items[T]:
    """Some of the items, in the order of their numbers; none is read before it is asked for."""
    return Lazy(len(numbers), lambda i: items[numbers[i]])
