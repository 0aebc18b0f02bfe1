"""The rule-based judge over supporting documents as a source of process rewards."""

from __future__ import annotations

from collections.abc import Sequence

from jraggym.labelling import Decision, Judge, RewardSource, support_judge


def support_source(judge: Judge = support_judge) -> RewardSource:
    """Rewards 1 / (1 + rank) by the rules of `labelling.grade`; another judge may know more (see recipes/task.py)."""

    def source(decisions: Sequence[Decision]) -> list[tuple[float | None, ...]]:
        return [tuple(judge(d.example, d.state, d.actions, d.found)) for d in decisions]

    return source
