"""What a run has measured at each step, kept in its checkpoints.

A run that goes on from a checkpoint tells all its steps again, from the first on. So whoever draws curves or counts
tokens needs no memory of its own: it hears what it would have heard without the interruption, each step once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax

Tell = Callable[[int, Mapping[str, Any]], None]


class History:
    """The metrics of the steps so far; `tell` gets (step, metrics) of each."""

    def __init__(self, tell: Tell | None = None):
        self._tell: Tell = tell or (lambda step, metrics: None)
        self._steps: list[int] = []
        self._columns: dict[str, list[float | str | None]] = {}
        self._waiting: list[tuple[int, Mapping[str, Any]]] = []  # values may still be on their way from the device

    def add(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Keeps the metrics of a step, and tells them."""
        self._waiting.append((step, metrics))
        self._tell(step, metrics)

    def saved(self) -> dict[str, Any]:
        """All of it as JSON values: {"step": [...], "metrics": {name: [...]}}, None where a step lacks a metric."""
        for step, metrics in jax.device_get(self._waiting):
            for name in metrics.keys() - self._columns.keys():
                self._columns[name] = [None] * len(self._steps)
            self._steps.append(int(step))
            for name, column in self._columns.items():
                column.append(_plain(float(metrics[name])) if name in metrics else None)
        self._waiting = []
        return {"step": list(self._steps), "metrics": {name: list(column) for name, column in self._columns.items()}}

    def restore(self, saved: Mapping[str, Any] | None) -> None:
        """Takes up, and tells, what `saved` gave at a checkpoint; older ones have nothing."""
        for i, step in enumerate(saved["step"] if saved else ()):
            values = ((name, column[i]) for name, column in saved["metrics"].items())  # type: ignore[index]
            self.add(step, {name: float(value) for name, value in values if value is not None})


def _plain(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)  # JSON has no NaN
