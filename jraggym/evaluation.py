"""Evaluation: every question counts (an unfinished or failed episode scores 0), with intervals and costs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jraggym.agents.episode import Episode
from jraggym.environment import outcome
from jraggym.errors import InputError
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


MEANS = ("calls", "candidates", "searches", "digests", "prompt_tokens", "tokens", "dollars")


def answer_scores(examples: Sequence[Example], episodes: Sequence[Episode], seed: int) -> dict[str, Any]:
    """The results of an agent's episodes: metrics with 95 % intervals, costs, and every question's own scores.

    All questions count, an unfinished one as 0. `costs` are means per question of `agents.episode.Costs`, and the sum
    of dollars; `faults` counts what went wrong: malformed candidates, failed calls, searches and digests, unfinished
    episodes. Raises InputError when there is no question.
    """
    if not examples:
        raise InputError("no question to score", got="0", remedy="Give at least one.")
    pairs = list(zip(examples, episodes, strict=True))
    each = [outcome(episode.trajectory.final, example) for example, episode in pairs]
    names = [name for name in ("em", "f1", "cover_em", "accuracy") if all(name in scores for scores in each)]
    columns = {name: [scores[name] for scores in each] for name in names}
    turns = [turn for episode in episodes for turn in episode.trajectory.final.turns]
    costs = {name: [getattr(episode.costs, name) for episode in episodes] for name in (*MEANS, "malformed", "errors")}
    return {
        "questions": len(examples),
        "metrics": {
            name: {"mean": float(np.mean(values)), "interval": list(bootstrap_interval(values, seed=seed))}
            for name, values in columns.items()
        },
        "costs": {**{name: float(np.mean(costs[name])) for name in MEANS}, "dollars_in_all": sum(costs["dollars"])},
        "faults": {
            "malformed": sum(costs["malformed"]),
            "model_errors": sum(costs["errors"]),
            # where a digest fails, the documents are there
            "failed_searches": sum(turn.error is not None and not turn.documents for turn in turns),
            "failed_digests": sum(turn.error is not None and bool(turn.documents) for turn in turns),
            "unfinished": sum(episode.trajectory.final.answer is None for episode in episodes),
        },
        "each": {"id": [example.id for example in examples], **columns},
    }
