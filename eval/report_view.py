"""What the report's template shows: scales, paths and merged candidates, computed from checked results.

Everything here is a pure function from plain JSON values to plain values; no markup is made here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from jraggym.text.actions import END_THINK, THINK, parse_action
from jraggym.types import Answer, Search

GROUPS = {
    "floor": "Floor",
    "baseline": "Baselines",
    "trained": "Trained",
    "control": "Controls",
    "ceiling": "Ceiling",
}
_LEFT, _TOP, _WIDTH, _HEIGHT = 44, 10, 246, 112  # the plot of one curve, in units of its drawing
_MINUS = "\N{MINUS SIGN}"  # as wide as a plus, so that columns of signed figures line up
_SMOOTHED = 40  # a curve of at least so many points also gets a running mean


@dataclass(frozen=True)
class Scale:
    """A linear axis from `lo` to `hi` with its tick values."""

    lo: float
    hi: float
    ticks: tuple[float, ...]

    def at(self, value: float) -> float:
        """Where `value` lies, in percent of the axis."""
        return round(100 * (value - self.lo) / (self.hi - self.lo), 2)


def scale_over(values: Iterable[float], *, zero: bool = True, snug: bool = False, bins: int = 4) -> Scale:
    """An axis with round ticks over `values`; `zero` adds 0 to them, `snug` ends the axis at the values."""
    values = [*values, *((0.0,) if zero else ())]
    lo, hi = min(values, default=0.0), max(values, default=0.0)
    if lo == hi:
        lo, hi = (0.0, 1.0) if zero and lo == 0 else (lo - 0.5, hi + 0.5)
    ticks = [float(tick) + 0.0 for tick in MaxNLocator(bins, steps=[1, 2, 2.5, 5, 10]).tick_values(lo, hi)]
    if not snug:
        lo, hi = ticks[0], ticks[-1]
    return Scale(lo, hi, tuple(tick for tick in ticks if lo <= tick <= hi))


def build(results: Mapping[str, Any]) -> dict[str, Any]:
    """The template's variables for results that `eval.report.check_results` accepts."""
    rows, stages = results["rows"], results["stages"]
    ends = np.cumsum([stage["seconds"] for stage in stages]).tolist()
    changes = [value for item in results["comparisons"] for value in (*item["interval"], item["difference"])]
    return {
        **results,
        **_headline(rows),
        "groups": [(group, GROUPS[group], found) for group in GROUPS if (found := _where(rows, group))],
        "scale": scale_over(value for row in rows for value in (row["em_interval"][1], row["em"], row["f1"])),
        "change_scale": scale_over(changes),
        "kinds": _kinds(rows),
        "panels": [
            (curve, _panel(name, points)) for curve in results["curves"] for name, points in curve["metrics"].items()
        ],
        "facts": {key: _facts(results[key]) for key in ("world", "labels", "config", "versions")},
        "histograms": [pair for key in ("labels", "world") for pair in _histograms(results[key])],
        "spans": [(stage, end - stage["seconds"], end) for stage, end in zip(stages, ends, strict=True)],
        "clock_scale": scale_over([results["seconds"], *ends], snug=True, bins=5),
        "episodes": episodes(results["trajectories"]),
        "command": _command(results),
    }


def _where(rows: Sequence[Any], group: str) -> list[Any]:
    return [row for row in rows if row["group"] == group]


def _headline(rows: Sequence[Any]) -> dict[str, Any]:
    """The best trained row and the warm start that it is compared with; either may be None."""
    started = [row for row in rows if "warm start" in row["name"].lower()]
    baselines = sorted(_where(rows, "baseline"), key=lambda row: -row["em"])
    warm = (*started, *baselines, None)[0]
    trained = [row for row in _where(rows, "trained") if row is not warm]
    return {"warm": warm, "best": max(trained, key=lambda row: row["em"], default=None)}


def _kinds(rows: Sequence[Any]) -> dict[str, int]:
    """Every question kind in order of appearance, with its largest number of questions."""
    kinds: dict[str, int] = {}
    for row in rows:
        for kind, cell in row["by_kind"].items():
            kinds[kind] = max(kinds.get(kind, 0), cell["questions"])
    return kinds


def _command(results: Mapping[str, Any]) -> str:
    command = results["config"].get("command")
    return command if isinstance(command, str) else f"python -m train.quickstart --out DIR --seed {results['seed']}"


def _panel(name: str, points: Sequence[Sequence[float]]) -> dict[str, Any]:
    """One metric of one curve as polylines; a value that is not finite interrupts the line."""
    finite = [(x, y) for x, y in points if math.isfinite(y)]
    x_scale = scale_over((x for x, _ in finite), zero=False, snug=True, bins=4)
    y_scale = scale_over((y for _, y in finite), zero=False, bins=4)
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        if math.isfinite(y):
            runs[-1].append((x, y))
        elif runs[-1]:
            runs.append([])
    window = max(1, len(finite) // 20)
    mean = _running_mean(finite, window) if len(finite) == len(points) >= _SMOOTHED else []
    return {
        "name": name,
        "lines": [_line(run, x_scale, y_scale) for run in runs if run],
        "mean": _line(mean, x_scale, y_scale) if mean else "",
        "first": finite[0] if finite else None,
        "last": (mean or finite)[-1] if finite else None,
        "end": _line((mean or finite)[-1:], x_scale, y_scale).split(" ")[0].split(",") if finite else None,
        "left_out": len(points) - len(finite),
        "x_ticks": [(_x(x_scale, tick), tick) for tick in x_scale.ticks],
        "y_ticks": [(_y(y_scale, tick), tick) for tick in y_scale.ticks],
    }


def _x(scale: Scale, value: float) -> float:
    return round(_LEFT + _WIDTH * scale.at(value) / 100, 1)


def _y(scale: Scale, value: float) -> float:
    return round(_TOP + _HEIGHT * (1 - scale.at(value) / 100), 1)


def _line(points: Sequence[tuple[float, float]], x_scale: Scale, y_scale: Scale) -> str:
    pairs = [f"{_x(x_scale, x)},{_y(y_scale, y)}" for x, y in points]
    return " ".join(pairs if len(pairs) > 1 else pairs * 2)  # a line from a point to itself is drawn as a dot


def _running_mean(points: Sequence[tuple[float, float]], window: int) -> list[tuple[float, float]]:
    """The mean of the last `window` values, from the first x that has so many."""
    means = np.convolve([y for _, y in points], np.full(window, 1 / window), "valid").tolist()
    return list(zip([x for x, _ in points[window - 1 :]], means, strict=True))


def _is_histogram(value: Any) -> bool:
    pairs = isinstance(value, list | tuple) and len(value) > 0
    return pairs and all(
        isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(n, int | float) for n in pair)
        for pair in value
    )


def _facts(value: Any, name: str = "") -> list[tuple[str, Any]]:
    """Free facts as (name, value); {"train": {"questions": 5}} becomes ("train · questions", 5)."""
    if not isinstance(value, Mapping):
        return [] if _is_histogram(value) else [(name, value)]
    prefix = f"{name} · " if name else ""
    return [fact for key, item in value.items() for fact in _facts(item, f"{prefix}{key}")]


def _histograms(facts: Mapping[str, Any]) -> list[tuple[str, Any, Scale]]:
    return [
        (name, pairs, scale_over(count for _, count in pairs)) for name, pairs in facts.items() if _is_histogram(pairs)
    ]


def episodes(trajectories: Sequence[Any]) -> list[dict[str, Any]]:
    """The trajectories with their candidates merged, and with the other agents' episodes of the same question.

    A candidate may bring `read`, its (kind, body, thought); else its text is parsed. A step may bring a `digest`.
    """
    steps = [[_step(step) for step in trajectory["steps"]] for trajectory in trajectories]
    shown = [item for episode in steps for step in episode for item in step["candidates"]]
    scales = {name: scale_over(item[name] for item in shown if item[name] is not None) for name in ("reward", "score")}
    same: dict[str, list[int]] = {}
    for index, trajectory in enumerate(trajectories):
        same.setdefault(trajectory["example_id"], []).append(index)
    return [
        {
            **trajectory,
            "steps": steps[index],
            "scales": scales,
            "correct": trajectory["em"] == 1,
            "others": [(other + 1, trajectories[other]) for other in same[trajectory["example_id"]] if other != index],
        }
        for index, trajectory in enumerate(trajectories)
    ]


def _step(step: Mapping[str, Any]) -> dict[str, Any]:
    """A step with identical candidates merged, the best first: by score, or else by reward, or else by log-prob."""
    texts: dict[str, list[Any]] = {}
    for candidate in step["candidates"]:
        texts.setdefault(candidate["text"], []).append(candidate)
    merged = [_merge(text, copies) for text, copies in texts.items()]
    known = [key for key in ("score", "reward", "logprob") if any(item[key] is not None for item in merged)]
    if known:
        merged.sort(key=lambda item: -math.inf if item[known[0]] is None else item[known[0]], reverse=True)
    return {"digest": None, **step, "candidates": merged, "known": known, "sampled": len(step["candidates"])}


def _merge(text: str, copies: Sequence[Any]) -> dict[str, Any]:
    kind, body, thought = copies[0].get("read") or _read(text)
    means = {key: _mean(copy[key] for copy in copies) for key in ("reward", "score", "logprob")}
    chosen = any(copy["chosen"] for copy in copies)
    return {**means, "kind": kind, "body": body, "thought": thought, "count": len(copies), "chosen": chosen}


def _read(text: str) -> tuple[str, str, str]:
    action = parse_action(text)
    kind, body, thought = "other", text, ""  # what does not follow the grammar is shown as it is
    if isinstance(action, Search | Answer):
        kind, body = ("search", action.query) if isinstance(action, Search) else ("answer", action.text)
        thought = text.partition(END_THINK)[0].strip().removeprefix(THINK).strip() if END_THINK in text else ""
    return kind, body, thought


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _percent(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f}"


def _signed(value: float) -> str:
    """A difference of shares in points: +12.3, −0.4."""
    return f"{100 * value:+.1f}".replace("-", _MINUS)


def _clock(seconds: float) -> str:
    """7.3 s, 4 m 07 s, 2 h 05 m."""
    if seconds < 99.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} m {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} m"


def _plain(value: Any) -> str:
    """Any free value as a short text."""
    if value is None:
        return "\N{EN DASH}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}".replace("-", _MINUS)
    if isinstance(value, float):
        return (f"{value:,.4g}" if abs(value) < 1e6 else f"{value:.2e}").replace("-", _MINUS)
    return ", ".join(_plain(item) for item in value) if isinstance(value, list | tuple) else str(value)


def _label(name: str) -> str:
    return name.replace("_", " ")


FILTERS = {"percent": _percent, "signed": _signed, "clock": _clock, "plain": _plain, "label": _label}
