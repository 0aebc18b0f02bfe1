"""The guard against divergence: a run stops at the first metric that is not finite."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from jraggym.errors import InputError


class Watch:
    """Stops a run at the first metric that is not finite, without making the device wait for the host.

    A step's metrics are read when the next step has been handed to the device.
    """

    def __init__(self) -> None:
        self._waiting: tuple[int, Mapping[str, Any]] | None = None

    def look(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Keeps the metrics of `step` and checks those of the step before; raises InputError naming it."""
        self.finish()
        self._waiting = step, metrics

    def finish(self) -> None:
        """Checks what is still waiting."""
        if self._waiting is None:
            return
        (step, metrics), self._waiting = self._waiting, None
        if bad := [name for name, value in metrics.items() if not np.isfinite(value).all()]:
            raise InputError(
                f"training diverged at step {step + 1}, on batch {step}",
                got=f"{', '.join(bad)} not finite",
                remedy="Look at that batch, or lower the learning rate; earlier checkpoints are untouched.",
            )
