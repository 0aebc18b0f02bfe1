"""Evaluation: every question counts (an unfinished or failed episode scores 0), with intervals and costs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jraggym.environment import outcome
from jraggym.metrics import bootstrap_interval, paired_bootstrap
from jraggym.text.actions import parse_action
from jraggym.types import Example, Malformed, Search, Trajectory


@dataclass(frozen=True)
class Row:
    """One agent on one question set: per-question scores, in the order of the questions, and mean costs."""

    name: str
    group: str
    note: str
    em: np.ndarray  # [questions]
    f1: np.ndarray  # [questions]
    kinds: tuple[str, ...]
    costs: dict[str, float]

    def summary(self, seed: int) -> dict[str, Any]:
        """The row for results.json, with 95 % bootstrap intervals."""
        by_kind: dict[str, list[float]] = defaultdict(list)
        for kind, em in zip(self.kinds, self.em, strict=True):
            by_kind[kind].append(float(em))
        return {
            "name": self.name,
            "group": self.group,
            "note": self.note,
            "questions": len(self.em),
            "em": float(self.em.mean()),
            "em_interval": list(bootstrap_interval(self.em, seed=seed)),
            "f1": float(self.f1.mean()),
            "f1_interval": list(bootstrap_interval(self.f1, seed=seed)),
            "by_kind": {k: {"questions": len(v), "em": float(np.mean(v))} for k, v in sorted(by_kind.items())},
            **self.costs,
        }


def score(
    name: str,
    group: str,
    note: str,
    examples: Sequence[Example],
    trajectories: Sequence[Trajectory],
    count_tokens: Callable[[Sequence[str]], int],
) -> Row:
    """Scores finished rollouts; `count_tokens` counts the generated tokens of candidate texts."""
    outcomes = [outcome(t.final, e) for e, t in zip(examples, trajectories, strict=True)]
    return Row(
        name,
        group,
        note,
        np.array([o["em"] for o in outcomes]),
        np.array([o["f1"] for o in outcomes]),
        tuple(example.kind for example in examples),
        _costs(trajectories, count_tokens),
    )


def _costs(trajectories: Sequence[Trajectory], count_tokens: Callable[[Sequence[str]], int]) -> dict[str, float]:
    """Means per question of searches, model calls (sampled actions) and generated tokens; malformed share; failures."""
    texts = [c.text for t in trajectories for s in t.steps for c in s.candidates]
    searches = sum(
        isinstance(turn.action, Search) and (bool(turn.documents) or turn.error is not None)
        for t in trajectories
        for turn in t.final.turns
    )
    number = max(len(trajectories), 1)
    return {
        "searches": searches / number,
        "calls": len(texts) / number,
        "tokens": count_tokens(texts) / number,
        "malformed": sum(isinstance(parse_action(text), Malformed) for text in texts) / max(len(texts), 1),
        "failed": sum(t.final.failed for t in trajectories),
    }


def compare(name: str, claim: str, better: Row, worse: Row, least: float, seed: int) -> dict[str, Any]:
    """A paired comparison for results.json: holds when the EM gain is at least `least` and its interval is above 0."""
    difference, low, high = paired_bootstrap(better.em, worse.em, seed=seed)
    return {
        "name": name,
        "claim": claim,
        "difference": difference,
        "interval": [low, high],
        "holds": bool(difference >= least and low > 0),
    }
