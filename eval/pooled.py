"""Several runs of the main job as one table: each agent's EM in every run, and the claims over all of them.

    python -m eval.pooled --runs runs/seed0 runs/seed1 runs/seed2

Each folder holds the scores.json of a finished run. Differences are paired by question; their 95 % intervals come from
resampling questions within each run.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from jraggym.errors import InputError, exit_on_input_error

SAMPLES = 2_000  # bootstrap samples


@dataclass(frozen=True)
class Arguments:
    """Pools finished runs of the main job."""

    runs: tuple[Path, ...]
    """Their --out folders; different seeds of the same job."""


@dataclass(frozen=True)
class Scores:
    """One run: EM of every question by agent, and the claims (better, worse, least difference)."""

    seed: int
    em: dict[str, np.ndarray]
    claims: list[tuple[str, str, float]]


def read(folders: Sequence[Path]) -> list[Scores]:
    """The scores of each run; InputError for a missing or damaged file, differing rows or claims, or a seed twice."""
    runs = []
    for folder in folders:
        path = folder / "scores.json"
        try:
            run = json.loads(path.read_text())
            em = {name: np.asarray(values, float) for name, values in run["em"].items()}
            claims = [(str(a), str(b), float(least)) for a, b, least in run["claims"]]
            runs.append(Scores(int(run["seed"]), em, claims))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            remedy = "Name the --out folder of a finished run."
            raise InputError(f"cannot read {path}", got=repr(error), remedy=remedy) from error
    if not runs:
        raise InputError("there is nothing to pool", got="no run", remedy="Name one or more --out folders.")
    shapes = [(sorted(run.em), run.claims) for run in runs]
    if any(shape != shapes[0] for shape in shapes):
        raise InputError(
            "the runs differ in rows or claims", got=list(map(str, folders)), remedy="Pool runs of one job."
        )
    if len({run.seed for run in runs}) < len(runs):
        raise InputError("a seed comes twice", got=[run.seed for run in runs], remedy="Pool runs of distinct seeds.")
    return runs


def pooled_difference(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[float, float, float]:
    """(mean, low, high) of the difference of paired scores [questions] over runs, which all count alike."""
    rng = np.random.default_rng(0)
    differences = [better - worse for better, worse in pairs]
    drawn = [d[rng.integers(0, len(d), (SAMPLES, len(d)))].mean(axis=1) for d in differences]
    low, high = np.quantile(np.mean(drawn, axis=0), [0.025, 0.975])
    return float(np.mean([d.mean() for d in differences])), float(low), float(high)


def main(arguments: Arguments) -> None:
    """Prints the table and the claims."""
    runs = read(arguments.runs)
    seeds = " | ".join(f"seed {run.seed}" for run in runs)
    print(f"| agent | {seeds} | mean EM |")
    print("|---" * (len(runs) + 2) + "|")
    for name in runs[0].em:
        each = [float(run.em[name].mean()) for run in runs]
        print(f"| {name} | {' | '.join(f'{em:.3f}' for em in each)} | {np.mean(each):.3f} |")
    print(f"\n| claim | {seeds} | all | 95 % interval | verdict |")
    print("|---" * (len(runs) + 4) + "|")
    for better, worse, least in runs[0].claims:
        pairs = [(run.em[better], run.em[worse]) for run in runs]
        mean, low, high = pooled_difference(pairs)
        gains = " | ".join(f"{(a - b).mean():+.3f}" for a, b in pairs)
        verdict = "holds" if mean >= least and low > 0 else "does not hold"
        print(f"| {better} - {worse} >= {least:+.2f} | {gains} | {mean:+.3f} | {low:+.3f} to {high:+.3f} | {verdict} |")


if __name__ == "__main__":
    with exit_on_input_error():
        main(tyro.cli(Arguments))
