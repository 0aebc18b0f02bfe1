"""What kept evidence from being read: for each document that an episode missed, the nearest it came to it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from jraggym.evidence.episodes import Budget, Choose, Lookup, Proposals, complete, read_ids, search_evidence, unread
from jraggym.types import Example, State

LOW, BEHIND, BEYOND = "proposed first, ranked too low", "proposed behind other documents", "out of reach"


def limits(examples: Sequence[Example], lookup: Lookup, choose: Choose, budget: Budget) -> dict[str, int]:
    """How many documents of the evidence `choose` missed, by reason: the first that held at any of its states.

    LOW: a proposal's search had it as its first new document, and was not carried out. BEHIND: it was among the first
    `documents` new ones of a proposal's search, but not the first. BEYOND: neither.
    """
    seen: list[tuple[Sequence[State], Sequence[Proposals]]] = []

    def noted(states: Sequence[State], offered: Sequence[Proposals]) -> Sequence[Sequence[int]]:
        seen.append((list(states), list(offered)))
        return choose(states, offered)

    final = search_evidence(examples, lookup, noted, budget, until=complete)
    found: Counter[str] = Counter({LOW: 0, BEHIND: 0, BEYOND: 0})
    for i, (example, end) in enumerate(zip(examples, final, strict=True)):
        missing = set(example.support) - read_ids(end)
        first, among = set[str](), set[str]()
        for states, offered in seen if missing else ():
            for hits in lookup([proposal.query for proposal in offered[i]], budget.read):
                new = [document.id for document in unread(states[i], hits)]
                first |= set(new[:1])
                among |= set(new[: budget.documents])
        found.update(LOW if one in first else BEHIND if one in among else BEYOND for one in missing)
    return dict(found)
