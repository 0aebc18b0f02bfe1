"""How far two sources of process rewards agree on the same records.

    python -m eval.agreement --data runs/collect/data/data/dataset --left outcome --right stored
    python -m eval.agreement --data runs/collect/data/data/dataset --left runs/label/labels/rollouts/dataset

A source is `stored` (the labels in the data), `outcome`, `random`, a jsonl file of human labels, or a dataset of the
same records under other labels, which is what `train.label` writes for sources that need a world or a model. Of chats
only their agent can tell what a candidate does: `outcome`, `random` and human labels of these need --episodes.

Counted are the distinct candidates that both have labelled. A pair of one state that the right source tells apart is
right where the left one orders it alike, and half right where the left one has a tie. Top-1 is the chance that the
left's best (any of them) is among the right's best, over the states where the right tells candidates apart. Kendall's
tau-b is the mean over states where both do. Intervals (95 %) come from resampling questions.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from jraggym.data.process import ProcessRecord, ProcessSource, open_dataset
from jraggym.errors import InputError, exit_on_input_error
from jraggym.recipes.agent_labels import decisions_of
from jraggym.sources.control import random_source
from jraggym.sources.human import human_source
from jraggym.sources.outcome import outcome_source
from jraggym.sources.relabel import Decide, bare_decisions

Labels = list[tuple[float | None, ...]]  # by record and candidate
SAMPLES = 2_000  # bootstrap samples
SUMS = ("pairs", "right", "states", "top", "taus", "tau", "candidates", "left_known", "right_known")


@dataclass(frozen=True)
class Arguments:
    """Compares two sources of process rewards."""

    data: Path
    """Dataset of train.collect."""
    left: str = "outcome"
    """stored, outcome, random, a .jsonl file of human labels, or a dataset of train.label."""
    right: str = "stored"
    """The same choice: the side that is taken for right."""
    metric: str = "em"
    """Outcome of an episode: em or f1."""
    episodes: Path | None = None
    """The evaluation by eval.qa that the data are of, where they are an agent's chats."""
    seed: int = 0
    """Of the random source and of the intervals."""


def labels_of(
    name: str, data: ProcessSource, metric: str = "em", seed: int = 0, decide: Decide = bare_decisions
) -> Labels:
    """The rewards of the named source for every record; InputError where it is none, or of other records.

    `decide` tells what candidates do: by default actions in tags, for chats `decisions_of` their evaluation.
    """
    records = list(data)
    if name == "stored":
        return [tuple(c.reward for c in record.candidates) for record in records]
    if name == "outcome":
        return outcome_source(records, metric, decide)(decide(records))
    if name == "random":
        return random_source(seed)(decide(records))
    if name.endswith(".jsonl"):
        return human_source(name)(decide(records))
    if not Path(name).is_dir():
        remedy = "Use stored, outcome, random, a .jsonl file, or a dataset of train.label."
        raise InputError("unknown source of rewards", got=repr(name), remedy=remedy)
    others = list(open_dataset(name))
    if [_contents(record) for record in others] != [_contents(record) for record in records]:
        raise InputError(f"{name} holds other records than the data", got=len(others), remedy="Label this data.")
    return [tuple(c.reward for c in record.candidates) for record in others]


def _contents(record: ProcessRecord) -> tuple:
    return record.id, record.state, tuple(candidate.text for candidate in record.candidates)


def agree(data: Sequence[ProcessRecord], left: Labels, right: Labels, seed: int = 0) -> dict[str, dict[str, Any]]:
    """The measures for all states, and for those before the first search, after one, and so on.

    Returns: {"all" or "after N turns": {pairs, pair_accuracy, pair_interval, tau, top1, unlabelled_left,
    unlabelled_right}}; a measure over nothing is None.
    """
    kinds: dict[str, dict[str, list[np.ndarray]]] = defaultdict(lambda: defaultdict(list))
    for record, a, b in zip(data, left, right, strict=True):
        counts = _count(record, a, b)
        for kind in ("all", f"after {len(record.state.turns)} turns"):
            kinds[kind][record.example_id].append(counts)
    rng = np.random.default_rng(seed)
    return {
        kind: _summary(np.array([np.sum(c, axis=0) for c in found.values()]), rng)
        for kind, found in sorted(kinds.items(), key=lambda item: (item[0] != "all", item[0]))
    }


def _count(record: ProcessRecord, left: Sequence[float | None], right: Sequence[float | None]) -> np.ndarray:
    """What one state adds to each of SUMS."""
    distinct = {c.text: (a, b) for c, a, b in reversed(list(zip(record.candidates, left, right, strict=True)))}
    both = [(a, b) for a, b in distinct.values() if a is not None and b is not None]
    signs = [(np.sign(p[0] - q[0]), np.sign(p[1] - q[1])) for p, q in itertools.combinations(both, 2)]
    told = [(a, b) for a, b in signs if b]
    sides = len(told), sum(1 for a, _ in signs if a)  # pairs that each side tells apart
    tau = sum(a * b for a, b in signs) / np.sqrt(sides[0] * sides[1]) if all(sides) else 0.0
    top = 0.0
    if told:
        best, good = (max(pair[side] for pair in both) for side in (0, 1))
        top = float(np.mean([b == good for a, b in both if a == best]))
    counted = {
        "pairs": len(told),
        "right": sum(0.5 if not a else float(a == b) for a, b in told),
        "states": bool(told),
        "top": top,
        "taus": all(sides),
        "tau": tau,
        "candidates": len(distinct),
        "left_known": sum(a is not None for a, _ in distinct.values()),
        "right_known": sum(b is not None for _, b in distinct.values()),
    }
    return np.array([counted[name] for name in SUMS], float)


def _summary(counts: np.ndarray, rng: np.random.Generator) -> dict[str, Any]:
    """The measures from the sums of each question [questions, SUMS]."""
    total = dict(zip(SUMS, counts.sum(axis=0), strict=True))
    drawn = counts[rng.integers(0, len(counts), (SAMPLES, len(counts)))][:, :, :2].sum(axis=1)
    shares = drawn[drawn[:, 0] > 0, 1] / drawn[drawn[:, 0] > 0, 0]
    interval = list(map(float, np.quantile(shares, [0.025, 0.975]))) if total["pairs"] else None
    return {
        "pairs": int(total["pairs"]),
        "pair_accuracy": _share(total["right"], total["pairs"]),
        "pair_interval": interval,
        "tau": _share(total["tau"], total["taus"]),
        "top1": _share(total["top"], total["states"]),
        "unlabelled_left": _share(total["candidates"] - total["left_known"], total["candidates"]),
        "unlabelled_right": _share(total["candidates"] - total["right_known"], total["candidates"]),
    }


def _share(part: float, whole: float) -> float | None:
    return float(part / whole) if whole else None


def table(found: dict[str, dict[str, Any]]) -> str:
    """The measures as a table."""
    lines = [
        "| states | pairs | pair accuracy | 95 % interval | tau | top-1 | unlabelled left | right |",
        "|---" * 8 + "|",
    ]
    for kind, row in found.items():
        interval = "-" if row["pair_interval"] is None else " to ".join(f"{x:.3f}" for x in row["pair_interval"])
        shares = [_shown(row[name]) for name in ("tau", "top1", "unlabelled_left", "unlabelled_right")]
        cells = [kind, str(row["pairs"]), _shown(row["pair_accuracy"]), interval, *shares]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _shown(share: float | None) -> str:
    return "-" if share is None else f"{share:.3f}"


def main(arguments: Arguments) -> None:
    """Prints the table."""
    data = open_dataset(arguments.data)
    decide: Decide = bare_decisions if arguments.episodes is None else decisions_of(arguments.episodes)
    left, right = (
        labels_of(name, data, arguments.metric, arguments.seed, decide) for name in (arguments.left, arguments.right)
    )
    print(table(agree(list(data), left, right, arguments.seed)))


if __name__ == "__main__":
    with exit_on_input_error():
        main(tyro.cli(Arguments))
