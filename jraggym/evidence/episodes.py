"""Episodes of evidence search: at every step the best few proposals of each state are carried out together.

Their documents that were not read before are read in turn: the first of each, the second of each ... So `searches`
times `documents` are read in all, as many different ones as a single search for so many would read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jraggym.evidence.proposals import Proposal, propose
from jraggym.preemption import stop_if_asked
from jraggym.types import Document, Example, Search, State, Turn

Lookup = Callable[[Sequence[str], int], Sequence[Sequence[Document]]]  # queries and k -> the k best of each
Proposals = Sequence[Proposal]
# The numbers of each state's proposals, best first; the states are those of all examples, in their order
Choose = Callable[[Sequence[State], Sequence[Proposals]], Sequence[Sequence[int]]]
Until = Callable[[State, Example], bool]


@dataclass(frozen=True, slots=True)
class Budget:
    """What an episode may do; `around` is the number of words on either side of a name that a critic reads."""

    searches: int = 4
    documents: int = 5  # of each search, none of them read before
    together: int = 5  # proposals that a search carries out
    around: int = 6

    @property
    def read(self) -> int:
        """Documents read in all."""
        return self.searches * self.documents

    @property
    def share(self) -> int:
        """Documents that one proposal brings at least, while it finds new ones; more where fewer are carried out."""
        return -(-self.documents // self.together)


def search_evidence(
    examples: Sequence[Example], lookup: Lookup, choose: Choose, budget: Budget, until: Until | None = None
) -> list[State]:
    """The state of each question after all its searches; a search is a turn for each proposal that it carries out.

    A state for which `until` holds is offered no proposals any more, and stays as it is.
    """
    states = [State(example.question) for example in examples]
    for _ in range(budget.searches):
        stop_if_asked()
        ended = [until is not None and until(state, example) for state, example in zip(states, examples, strict=True)]
        offered = [() if end else propose(state, budget.around) for state, end in zip(states, ended, strict=True)]
        orders = choose(states, offered)
        queries = [
            [proposals[number].query for number in order[: budget.together]]
            for proposals, order in zip(offered, orders, strict=True)
        ]
        found = iter(lookup([query for asked in queries for query in asked], budget.read))
        for i, asked in enumerate(queries):
            turns = zip(asked, in_turn(states[i], [next(found) for _ in asked], budget.documents), strict=True)
            states[i] = State(states[i].question, (*states[i].turns, *(Turn(Search(q), docs) for q, docs in turns)))
    return states


def in_turn(state: State, found: Sequence[Sequence[Document]], documents: int) -> list[tuple[Document, ...]]:
    """What is read of each search's documents, `documents` in all: the first new one of each, then the second of each.

    Of (A, B, C) and (A, D), four: (A, B, C) and (D).
    """
    seen, waiting = read_ids(state), {number: iter(hits) for number, hits in enumerate(found)}
    read: list[list[Document]] = [[] for _ in found]
    while waiting:
        for number, hits in list(waiting.items()):
            if sum(map(len, read)) == documents:
                return [tuple(brought) for brought in read]
            new = next((document for document in hits if document.id not in seen), None)
            if new is None:
                del waiting[number]
            else:
                read[number].append(new)
                seen.add(new.id)
    return [tuple(brought) for brought in read]


def unread(state: State, documents: Sequence[Document]) -> tuple[Document, ...]:
    """Those that no earlier search of the state brought."""
    seen = read_ids(state)
    return tuple(document for document in documents if document.id not in seen)


def read_ids(state: State) -> set[str]:
    """The ids of all documents read."""
    return {document.id for turn in state.turns for document in turn.documents}


def complete(state: State, example: Example) -> bool:
    """Has all supporting evidence been read?"""
    return set(example.support) <= read_ids(state)


def gains(example: Example, state: State, found: Sequence[Sequence[Document]]) -> list[float]:
    """The process reward of each proposal: the share of the evidence still missing that its search, `found`, brings."""
    missing = set(example.support) - read_ids(state)
    return [len(missing & {document.id for document in documents}) / max(len(missing), 1) for documents in found]
