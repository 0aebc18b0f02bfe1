"""What a step costs: where its seconds go, tokens and FLOPs a second, memory, and on demand a profiler's trace.

seconds_data         building a batch and handing it to the devices
seconds_compute      a training step of the devices, exchanges between them included (a trace tells them apart)
seconds_rollout      sampling episodes; seconds_retrieval is the part of it in which a retriever searches
seconds_hosts        waiting for the other processes of the job, wherever that was
seconds_checkpoint   writing one
seconds_evaluate     evaluating the policy
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jraggym.clock import take
from jraggym.planning.topologies import CHIPS

TRACED = 3  # steps of a trace
LOOK = 2.0  # seconds between two looks for a request: in a mounted bucket a look is not free
# FLOP/s in bfloat16 without sparsity, by jax's name of the device; of GPUs from NVIDIA's data sheets
PEAKS = {
    "TPU v5 lite": CHIPS["v5e"].flops,
    "TPU v5": CHIPS["v5p"].flops,
    "TPU v5p": CHIPS["v5p"].flops,
    "TPU v6 lite": CHIPS["v6e"].flops,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}

Tell = Callable[[int, Mapping[str, float]], None]


class Meter:
    """Measures each step, and tells (step, measures) one step later, so that no device is waited for.

    With a `folder`, a file `trace` in it asks for a profiler's trace of the next steps in `folder`/profile. To be left
    as a context, which tells the last step and ends a trace under way.
    """

    def __init__(self, tell: Tell | None = None, folder: Path | None = None):
        self._tell, self._folder = tell or (lambda step, measures: None), folder
        self._flops: float | None = None
        self._waiting: tuple[int, dict[str, float], Array | float] | None = None
        self._looked, self._traced = 0.0, 0
        take()
        self._before = time.perf_counter()

    def count(self, flops: Callable[[], float]) -> None:
        """Asks once for the FLOPs of a step over all devices, where the peak of a device is known."""
        if self._flops is None and peak_flops() is not None:
            self._flops = flops()

    def step(self, number: int, tokens: Array | float) -> None:
        """Ends a step that read, or sampled, so many tokens."""
        self.finish()
        now = time.perf_counter()
        measures = {"seconds": now - self._before} | {f"seconds_{kind}": x for kind, x in take().items()}
        self._before, self._waiting = now, (number, measures, tokens)
        self._trace()

    def finish(self) -> None:
        """Tells what is still waiting."""
        if self._waiting is None:
            return
        (number, measures, tokens), self._waiting = self._waiting, None
        measures |= {"tokens_per_second": float(tokens) / measures["seconds"], **memory()}
        if self._flops is not None and (peak := peak_flops()) is not None:
            measures["mfu"] = self._flops / measures["seconds"] / (peak * jax.device_count())
        self._tell(number, measures)

    def __enter__(self) -> Meter:
        return self

    def __exit__(self, *_: object) -> None:
        """Tells the last step, and ends a trace that is under way."""
        self.finish()
        if self._traced:
            self._end_trace()

    def _trace(self) -> None:
        if self._folder is None:
            return
        if self._traced:
            self._traced += 1
            if self._traced > TRACED:
                self._end_trace()
        elif time.monotonic() - self._looked >= LOOK:
            self._looked = time.monotonic()
            if (self._folder / "trace").exists():
                jax.profiler.start_trace(str(self._folder / "profile"))
                self._traced = 1

    def _end_trace(self) -> None:
        assert self._folder is not None
        jax.profiler.stop_trace()
        self._traced = 0
        (self._folder / "trace").unlink(missing_ok=True)


def tokens_of(batch: Any) -> Array | float:
    """The real tokens of a batch, prompts once: still on their way from the device."""
    batch = getattr(batch, "batch", batch)
    return _tokens(batch.prompt_mask, batch.action_mask) if hasattr(batch, "prompt_mask") else 0.0


_tokens = jax.jit(lambda *masks: sum(jnp.sum(mask) for mask in masks))


def peak_flops() -> float | None:
    """Of a device of this process, in FLOP/s; None where it is not known, as of a CPU."""
    return PEAKS.get(jax.local_devices()[0].device_kind)


def memory() -> dict[str, float]:
    """The most memory used so far, in GiB: of this process and, where it keeps count, of its fullest device."""
    found = {"host_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}  # Linux counts in KiB
    stats = [device.memory_stats() for device in jax.local_devices()]
    if peaks := [s["peak_bytes_in_use"] for s in stats if s and "peak_bytes_in_use" in s]:
        found["device_gib"] = max(peaks) / 2**30
    return found
