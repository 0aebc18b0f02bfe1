"""Episodes of evidence search: at every step one proposal of each state is carried out.

Each search reads the best documents that were not read before, so `searches` times `documents` are read in all, as
many different ones as a single search for so many would read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jraggym.evidence.proposals import Proposal, propose
from jraggym.preemption import stop_if_asked
from jraggym.types import Document, Example, Search, State, Turn

Lookup = Callable[[Sequence[str], int], Sequence[Sequence[Document]]]  # queries and k -> the k best of each
Proposals = Sequence[Proposal]
# Which proposal of each state is carried out; the states are those of all examples, in their order
Choose = Callable[[Sequence[State], Sequence[Proposals]], Sequence[int]]


@dataclass(frozen=True, slots=True)
class Budget:
    """What an episode may do; `around` is the number of words on either side of a name that a critic reads."""

    searches: int = 4
    documents: int = 5  # of each search, none of them read before
    around: int = 6

    @property
    def read(self) -> int:
        """Documents read in all."""
        return self.searches * self.documents


def search_evidence(examples: Sequence[Example], lookup: Lookup, choose: Choose, budget: Budget) -> list[State]:
    """The state of each question after all its searches."""
    states = [State(example.question) for example in examples]
    for _ in range(budget.searches):
        stop_if_asked()
        offered = [propose(state, budget.around) for state in states]
        chosen = choose(states, offered)
        queries = [proposals[number].query for proposals, number in zip(offered, chosen, strict=True)]
        for i, hits in enumerate(lookup(queries, budget.read)):
            turn = Turn(Search(queries[i]), unread(states[i], hits)[: budget.documents])
            states[i] = State(states[i].question, (*states[i].turns, turn))
    return states


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
