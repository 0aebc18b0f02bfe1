"""Rewards that are known beforehand: a table from a state and an action to a reward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jraggym.labelling import Decision, RewardSource
from jraggym.types import Action, State

Table = Mapping[tuple[str, State], Mapping[Action, float | None]]  # (example id, state) -> action -> reward


def table_source(table: Table) -> RewardSource:
    """Rewards out of the table; what is not in it is unlabelled."""

    def source(decisions: Sequence[Decision]) -> list[tuple[float | None, ...]]:
        found: list[tuple[float | None, ...]] = []
        for decision in decisions:
            known = table.get((decision.example.id, decision.state), {})
            found.append(tuple(map(known.get, decision.actions)))
        return found

    return source
