"""Outcome supervision (ORM): what was executed gets the outcome of its episode, and nothing else is labelled."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from jraggym.data.process import ProcessRecord
from jraggym.errors import InputError
from jraggym.labelling import RewardSource
from jraggym.sources.relabel import Decide, bare_decisions
from jraggym.sources.table import table_source
from jraggym.types import Action, State

METRICS = ("em", "f1")


def outcome_source(
    records: Iterable[ProcessRecord], metric: str = "em", decide: Decide = bare_decisions
) -> RewardSource:
    """The mean outcome of the episodes in `records` that took the action at the state; None for actions never taken.

    A decision alone does not say what became of it, so the source is made from the finished episodes. `metric` is em
    or f1; another one raises InputError. `decide` tells what candidates do.
    """
    if metric not in METRICS:
        raise InputError("unknown outcome", got=metric, remedy=f"Use one of {', '.join(METRICS)}.")
    taken: dict[tuple[str, State], dict[Action, list[float]]] = defaultdict(lambda: defaultdict(list))
    records = list(records)
    for record, decision in zip(records, decide(records), strict=True):
        action = decision.actions[record.chosen]
        taken[record.example_id, record.state][action].append(getattr(record, metric))
    return table_source({at: {a: sum(v) / len(v) for a, v in found.items()} for at, found in taken.items()})
