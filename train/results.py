"""What the main job tells: progress on the way, and at the end the table, the claims and results.json."""

from __future__ import annotations

import datetime
import importlib.metadata
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from jraggym.data.process import ProcessRecord
from jraggym.evaluation import Row, compare
from jraggym.hosts import lead
from jraggym.recipes.collecting import sampled_tokens
from jraggym.recipes.quickstart import Workshop
from jraggym.recipes.rows import sample_for_report
from jraggym.recipes.settings import Settings
from jraggym.types import Trajectory

PACKAGES = ("jraggym", "jax", "flax", "optax", "orbax-checkpoint", "scann", "numpy")


class Console:
    """Progress bars, one for each stage, and the time that each took."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.stages: list[dict[str, Any]] = []
        self.curves: dict[str, dict[str, list[list[float]]]] = {}
        self._bar: tqdm | None = None
        self._silent = not lead()

    @contextmanager
    def stage(self, name: str, detail: str = "") -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._close()
        self.stages.append({"name": name, "seconds": time.perf_counter() - start, "detail": detail})

    def progress(self, stage: str, done: int, total: int, metrics: Any) -> None:
        if self._silent:
            return
        if self._bar is None or self._bar.desc != stage:
            self._close()
            self._bar = tqdm(total=total, desc=stage, initial=0, file=sys.stderr)
        self._bar.update(done - self._bar.n)
        if metrics is not None and (done % 5 == 0 or done == total):
            curve = self.curves.setdefault(stage, {})
            for name in metrics.keys() & {"loss", "accuracy"}:
                curve.setdefault(name, []).append([done, float(metrics[name])])

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar = None


def claims(candidates: int) -> list[tuple[str, str, float]]:
    """What has to beat what, and by how much EM at least; written before the run."""
    critic, both = f"warm start + critic best of {candidates}", f"DPO + critic best of {candidates}"
    return [
        ("DPO", "warm start, greedy", 0.15),
        ("DPO", "warm start trained longer", 0.0),
        ("DPO", "DPO, shuffled rewards", 0.0),
        ("SFT on good actions", "warm start, greedy", 0.0),
        (critic, "warm start, greedy", 0.10),
        (critic, f"warm start, majority of {candidates}", 0.10),
        (critic, f"warm start + shuffled critic best of {candidates}", 0.0),
        (critic, f"warm start + random best of {candidates}", 0.0),
        (both, "DPO", 0.03),
        (both, f"DPO, majority of {candidates}", 0.0),
        ("DPO", "DPO, broken retriever", 0.0),
    ]


def comparisons(rows: Mapping[str, Row], settings: Settings) -> list[dict[str, Any]]:
    """The claims with their paired differences on the rows."""
    return [
        compare(f"{a} - {b}", f"at least {least:+.2f} EM, interval above 0", rows[a], rows[b], least, settings.seed)
        for a, b, least in claims(settings.candidates)
    ]


def scores(rows: Mapping[str, Row], settings: Settings) -> dict[str, Any]:
    """The contents of scores.json: EM of every question, and the claims (eval/pooled.py pools runs)."""
    return {
        "seed": settings.seed,
        "em": {name: row.em.tolist() for name, row in rows.items()},
        "claims": [list(claim) for claim in claims(settings.candidates)],
    }


def gather(
    shop: Workshop,
    console: Console,
    rows: Mapping[str, Row],
    runs: Mapping[str, Sequence[Trajectory]],
    records: Sequence[ProcessRecord],
) -> dict[str, Any]:
    """The contents of results.json (see eval/report.py)."""
    settings, n = shop.settings, shop.settings.candidates
    shown = ["warm start, greedy", "DPO", f"warm start + critic best of {n}", f"DPO + critic best of {n}"]
    rewards = [c.reward for r in records for c in r.candidates if c.reward is not None]
    return {
        "title": "A search agent from process supervision",
        "dataset": shop.task.name,
        "seed": settings.seed,
        "seconds": time.perf_counter() - console.start,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "config": {"command": f"python -m train.quickstart {' '.join(sys.argv[1:])}".strip(), **settings.fingerprint()},
        "stages": console.stages,
        "rows": [row.summary(settings.seed) for row in rows.values()],
        "comparisons": comparisons(rows, settings),
        "curves": [{"name": name, "x": "step", "metrics": curve} for name, curve in console.curves.items()],
        "world": {
            f"{name} {what}": len(getattr(getattr(shop.task, name), attribute))
            for name in ("train", "development", "test")
            for what, attribute in (("questions", "examples"), ("documents", "corpus"))
        },
        "labels": {
            "states": len(records),
            "candidates": len(rewards),
            "sampled tokens": sampled_tokens(records),
            "mean reward": sum(rewards) / max(len(rewards), 1),
            "rewards": [[value, rewards.count(value)] for value in sorted(set(rewards))],
        },
        "trajectories": sample_for_report(
            shop.task.test, {name: runs[name] for name in shown}, rows, 15, settings.seed
        ),
    }


def show(results: dict[str, Any], out: Path) -> None:
    """Prints the table and the claims."""
    print(f"{'':42s} {'EM':>5s}  {'95 % interval':>14s} {'F1':>6s} {'searches':>9s} {'calls':>6s} {'tokens':>7s}")
    for row in results["rows"]:
        low, high = row["em_interval"]
        print(
            f"{row['name']:42s} {row['em']:5.3f}  {low:6.3f}–{high:6.3f}  {row['f1']:6.3f} {row['searches']:9.2f}"
            f" {row['calls']:6.1f} {row['tokens']:7.1f}"
        )
    print()
    for claim in results["comparisons"]:
        low, high = claim["interval"]
        mark = "holds" if claim["holds"] else "DOES NOT HOLD"
        print(f"{claim['name']:78s} {claim['difference']:+.3f} [{low:+.3f}, {high:+.3f}]  {claim['claim']}: {mark}")
    print(f"\n{results['seconds']:.0f} s; {out / 'results.json'} and {out / 'report.html'}")
