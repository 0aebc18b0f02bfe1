"""The training loop: an objective and an optimiser become one jitted step; batches are a function of the step.

An objective is a pure function (weights, batch, frozen) -> (loss, metrics), where `frozen` holds weights that are
read but not trained, such as DPO's reference. The state is donated, so each step reuses
its memory. Resuming restores the state and the step; since batch i is a pure function of (seed, i), nothing else
has to be remembered.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import Array

from jraggym.batch import ProcessBatch
from jraggym.checkpoint import Checkpointer
from jraggym.errors import InputError

Metrics = dict[str, Array]
Objective = Callable[[Any, ProcessBatch, Any], tuple[Array, Metrics]]


@struct.dataclass
class TrainState:
    """Everything that a step changes."""

    step: Array  # int32, updates done so far
    weights: Any
    optimizer: Any


@dataclass(frozen=True, slots=True)
class Optimization:
    """Muon on the matrices, AdamW on the rest (or AdamW alone); linear warm-up, then a cosine to zero."""

    steps: int
    matrix_rate: float = 1.6e-2  # learning rate of Muon; 0 puts everything under AdamW
    rate: float = 2e-3  # learning rate of AdamW
    warmup: int = 50
    decay: float = 0.0  # weight decay
    clip: float = 1.0  # global norm of the gradient

    def build(self) -> optax.GradientTransformation:
        """The optax chain."""
        chain = [optax.clip_by_global_norm(self.clip)]
        if self.matrix_rate:
            chain.append(
                optax.contrib.muon(
                    self._schedule(self.matrix_rate),
                    weight_decay=self.decay,
                    adam_learning_rate=self._schedule(self.rate),
                    adam_weight_decay=self.decay,
                    muon_weight_dimension_numbers=_stacked_matrices,
                )
            )
        else:
            chain.append(optax.adamw(self._schedule(self.rate), weight_decay=self.decay))
        return optax.chain(*chain)

    def _schedule(self, peak: float) -> optax.Schedule:
        warmup = min(self.warmup, self.steps // 2)
        return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, max(self.steps, warmup + 1))


def _stacked_matrices(weights: Any) -> Any:
    """Muon's view of the layers' weights [N, in, out]: N matrices; everything else goes to AdamW."""

    def view(leaf: Array) -> Any:
        return optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2) if leaf.ndim == 3 else None

    return jax.tree.map(view, weights)


def init_state(weights: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step; it owns a copy of the weights, since steps donate their state."""
    weights = jax.tree.map(jnp.copy, weights)
    return TrainState(jnp.int32(0), weights, optimizer.init(weights))


def make_step(
    objective: Objective, optimizer: optax.GradientTransformation
) -> Callable[..., tuple[TrainState, Metrics]]:
    """The jitted update (state, batch, frozen=None) -> (state, metrics); it compiles once for each batch shape."""

    def step(state: TrainState, batch: ProcessBatch, frozen: Any = None) -> tuple[TrainState, Metrics]:
        (_, metrics), gradient = jax.value_and_grad(objective, has_aux=True)(state.weights, batch, frozen)
        updates, moments = optimizer.update(gradient, state.optimizer, state.weights)
        weights = optax.apply_updates(state.weights, updates)
        metrics = metrics | {"gradient_norm": optax.global_norm(gradient)}
        return TrainState(state.step + 1, weights, moments), metrics

    return jax.jit(step, donate_argnums=0)


@functools.lru_cache(maxsize=8)
def _shared_step(objective: Objective, optimization: Optimization) -> Callable[..., tuple[TrainState, Metrics]]:
    """One jitted update for all runs of the same objective and optimiser, so that it is compiled once."""
    return make_step(objective, optimization.build())


class BatchSource(Protocol):
    """Batch `step` of a training run, as a pure function of the step."""

    def __getitem__(self, step: int) -> ProcessBatch: ...


@dataclass(frozen=True)
class Run:
    """One training run: what is optimised, how, on what, and what stays frozen."""

    objective: Objective
    optimization: Optimization
    batches: BatchSource
    frozen: Any = None


def fit(
    run: Run,
    weights: Any,
    checkpointer: Checkpointer | None = None,
    *,
    every: int = 100,
    report: Callable[[int, Metrics], None] | None = None,
) -> Any:
    """Trains from `weights` and returns the final weights; resumes from the newest checkpoint.

    Saves the whole state after every `every` steps and at the end; killed at any moment and called again, it ends
    with the same bits. `report` gets (updates done, metrics) of each step. Raises InputError at a loss that is not
    finite, naming the step; the last checkpoint stays as it is.
    """
    optimizer = run.optimization.build()
    state = init_state(weights, optimizer)
    if checkpointer is not None and checkpointer.latest() is not None:
        state, _ = checkpointer.restore(jax.tree.map(_abstract, state))
    step = _shared_step(run.objective, run.optimization)
    for i in range(int(state.step), run.optimization.steps):
        state, metrics = step(state, run.batches[i], run.frozen)
        last = i + 1 == run.optimization.steps
        if last or (i + 1) % every == 0:
            _check_finite(i, metrics)
            if checkpointer is not None:
                checkpointer.save(i + 1, state, {"step": i + 1})
        if report is not None:
            report(i + 1, metrics)
    return state.weights


def _abstract(leaf: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _check_finite(step: int, metrics: Metrics) -> None:
    bad = [name for name, value in metrics.items() if not jnp.isfinite(value)]
    if bad:
        raise InputError(
            f"training diverged by step {step}", got=f"{', '.join(bad)} not finite", remedy="Lower the learning rate."
        )
