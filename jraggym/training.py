"""The training loop: an objective and an optimiser become one jitted step; batches are a function of the step.

An objective is a pure function (weights, batch, frozen, key) -> (loss, metrics): `weights` are trained, `frozen` is
read only (DPO's reference, the base under LoRA), and `key` is a random key of the step (for dropout). The state is
donated, so each step reuses its memory. Resuming restores the state and the step; since batch i is a pure function of
(seed, i), nothing else decides what comes. The metrics so far are kept beside it (history.py).
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
from jax.sharding import Mesh, NamedSharding

from jraggym.checkpoint import Checkpointer
from jraggym.clock import spent
from jraggym.errors import InputError
from jraggym.history import History, Tell
from jraggym.meter import Meter, tokens_of
from jraggym.planning.flops import count_flops
from jraggym.preemption import Preempted, should_stop
from jraggym.sharding import batch_sharding, own_rows, place, place_rows, whole_on
from jraggym.watch import Watch

Metrics = dict[str, Array]
Objective = Callable[[Any, Any, Any, Array], tuple[Array, Metrics]]
SCHEDULES = ("cosine", "linear", "constant")


@struct.dataclass
class TrainState:
    """Everything that a step changes."""

    step: Array  # int32, updates done so far
    weights: Any
    optimizer: Any


@dataclass(frozen=True, slots=True)
class Optimization:
    """Muon on the matrices, AdamW on the rest (or AdamW alone), after a linear warm-up."""

    steps: int
    matrix_rate: float = 1.6e-2  # learning rate of Muon; 0 puts everything under AdamW
    rate: float = 2e-3  # learning rate of AdamW
    warmup: int = 50
    schedule: str = "cosine"  # after the warm-up, to zero; or "linear" to zero, or "constant"
    decay: float = 0.0  # weight decay
    clip: float = 1.0  # global norm of the gradient

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise InputError("unknown schedule", got=self.schedule, remedy=f"Use one of {', '.join(SCHEDULES)}.")
        if self.steps < 1 or self.clip <= 0:
            raise InputError("optimization: steps >= 1 and clip > 0", got=self, remedy="Raise them.")

    def build(self) -> optax.GradientTransformation:
        """The optax chain."""
        chain = [optax.clip_by_global_norm(self.clip)]
        if self.matrix_rate:
            chain.append(
                optax.contrib.muon(
                    self._rates(self.matrix_rate),
                    weight_decay=self.decay,
                    adam_learning_rate=self._rates(self.rate),
                    adam_weight_decay=self.decay,
                    muon_weight_dimension_numbers=_stacked_matrices,
                )
            )
        else:
            chain.append(optax.adamw(self._rates(self.rate), weight_decay=self.decay))
        return optax.chain(*chain)

    def _rates(self, peak: float) -> optax.Schedule:
        warmup = min(self.warmup, self.steps // 2)
        total = max(self.steps, warmup + 1)
        if self.schedule == "cosine":
            return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, total)
        end = peak if self.schedule == "constant" else 0.0
        after = optax.linear_schedule(peak, end, total - warmup)
        return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup]) if warmup else after


def _stacked_matrices(weights: Any) -> Any:
    """Muon's view of the layers' weights [N, in, out]: N matrices; everything else goes to AdamW."""

    def view(leaf: Array) -> Any:
        return optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2) if leaf.ndim == 3 else None

    return jax.tree.map(view, weights)


def init_state(weights: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step; it owns a copy of the weights, since steps donate their state.

    Moments lie where their weights lie, and what has no shape is on every device of the weights' mesh.
    """
    weights = jax.tree.map(jnp.copy, weights)
    state = TrainState(jnp.int32(0), weights, optimizer.init(weights))
    if not (named := _named(weights)):
        return state
    everywhere = whole_on(named[0].mesh)
    return jax.tree.map(lambda x: x if _named(x) else place(x, everywhere), state)


def abstract_state(weights: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """What `init_state` returns for such weights, as shapes, types and placement: nothing is in memory."""
    named, places = _named(weights), dict(jax.tree_util.tree_leaves_with_path(weights))
    everywhere = whole_on(named[0].mesh) if named else None

    def put(path: tuple, leaf: Any) -> jax.ShapeDtypeStruct:
        """A moment has its weight's place in the tree, behind its own name, and its shape."""
        own = [places[path[i:]] for i in range(len(path)) if path[i:] in places]
        where = own[0].sharding if own and own[0].shape == leaf.shape else everywhere
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    moments = jax.tree_util.tree_map_with_path(put, jax.eval_shape(optimizer.init, weights))
    step: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere)
    return TrainState(step, weights, moments)


def _named(tree: Any) -> list[NamedSharding]:
    """The shardings of the leaves that lie on a mesh."""
    places = [getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(tree)]
    return [sharding for sharding in places if isinstance(sharding, NamedSharding)]


class Step:
    """The jitted update (state, batch, frozen=None, seed=0) -> (state, metrics); the given state is used up.

    It compiles once for a batch shape: the new state has the placement of the old one, whatever the compiler would
    have liked better.
    """

    def __init__(self, objective: Objective, optimizer: optax.GradientTransformation):
        self._objective, self._optimizer = objective, optimizer
        self._jitted: dict[tuple[NamedSharding, ...], Any] = {}

    def __call__(
        self, state: TrainState, batch: Any, frozen: Any = None, seed: Array | int = 0
    ) -> tuple[TrainState, Metrics]:
        return self.program(state)(state, batch, frozen, seed)

    def program(self, state: TrainState) -> Any:
        """The jitted update of states that lie as this one does, whose arrays may be abstract."""
        placement = tuple(_named(state))
        if placement not in self._jitted:
            where = (jax.tree.map(lambda x: x.sharding, state), None) if placement else None
            self._jitted[placement] = jax.jit(self._update, donate_argnums=0, out_shardings=where)
        return self._jitted[placement]

    @property
    def compilations(self) -> int:
        """How many programs were compiled so far."""
        return sum(jitted._cache_size() for jitted in self._jitted.values())

    def _update(self, state: TrainState, batch: Any, frozen: Any, seed: Array | int) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        (_, metrics), gradient = jax.value_and_grad(self._objective, has_aux=True)(state.weights, batch, frozen, key)
        updates, moments = self._optimizer.update(gradient, state.optimizer, state.weights)
        weights = optax.apply_updates(state.weights, updates)
        metrics = metrics | {"gradient_norm": optax.global_norm(gradient)}
        return TrainState(state.step + 1, weights, moments), metrics


@functools.lru_cache(maxsize=8)
def shared_step(objective: Objective, optimization: Optimization) -> Step:
    """One jitted update for all runs of the same objective and optimiser, so that it is compiled once."""
    return Step(objective, optimization.build())


class BatchSource(Protocol):
    """Batch `step` of a training run, as a pure function of the step.

    A source that can build some rows alone has `part(step, own)` too (see text.batching.Batches): of several processes
    each then builds only those that its devices hold.
    """

    def __getitem__(self, step: int) -> Any: ...


@dataclass(frozen=True)
class Run:
    """One training run: what is optimised, how, on what, what stays frozen, and on which devices.

    With a `mesh`, weights and `frozen` have been placed on it (see sharding.shardings); batches are placed by `fit`.
    """

    objective: Objective
    optimization: Optimization
    batches: BatchSource
    frozen: Any = None
    seed: int = 0  # of dropout
    mesh: Mesh | None = None
    plain: Objective | None = None  # the objective without rematerialisation: its FLOPs are the model's own


def fit(
    run: Run,
    weights: Any,
    checkpointer: Checkpointer | None = None,
    *,
    every: int = 100,
    report: Tell | None = None,
    meter: Meter | None = None,
) -> Any:
    """Trains from `weights` and returns the final weights; resumes from the newest whole checkpoint.

    Saves the whole state after every `every` steps, at the end, and when a signal asks the job to end (`Preempted`);
    killed at any moment and called again, it ends with the same bits. `report` gets (updates done, metrics) of each
    step once, also of those before a checkpoint; `meter` measures the steps. Raises InputError at the first loss or
    gradient that is not finite, naming the step and its batch; the last checkpoint stays as it is.
    """
    optimizer = run.optimization.build()
    state, history, watch, saved = init_state(weights, optimizer), History(report), Watch(), 0
    if checkpointer is not None and checkpointer.latest() is not None:
        state, data = checkpointer.restore(jax.tree.map(abstract, state))
        history.restore(data.get("history"))
        saved = int(state.step)

    def save(done: int) -> None:
        watch.finish()
        if checkpointer is not None and done > saved:
            with spent("checkpoint"):
                checkpointer.save(done, state, {"step": done, "history": history.saved()})

    step = shared_step(run.objective, run.optimization)
    with meter or Meter() as cost:
        for i in range(int(state.step), run.optimization.steps):
            stop = should_stop()
            if stop or i % every == 0:
                save(i)
            if stop:
                raise Preempted
            with spent("data"):
                batch = batch_at(run.batches, i, run.mesh)
            cost.count(lambda: _model_flops(run, optimizer, state, batch))  # noqa: B023
            with spent("compute"):
                state, metrics = step(state, batch, run.frozen, run.seed)
                watch.look(i, metrics)
            cost.step(i + 1, tokens_of(batch))
            history.add(i + 1, metrics)
        save(run.optimization.steps)
    return state.weights


def _model_flops(run: Run, optimizer: optax.GradientTransformation, state: TrainState, batch: Any) -> float:
    program = Step(run.plain or run.objective, optimizer).program(state)
    return count_flops(program.trace(jax.tree.map(abstract, state), batch, run.frozen, run.seed).jaxpr)


def placed(batch: Any, mesh: Mesh | None) -> Any:
    """The batch with its rows spread over the mesh, or as it is without one."""
    return batch if mesh is None else place(batch, batch_sharding(mesh))


def batch_at(batches: BatchSource, step: int, mesh: Mesh | None) -> Any:
    """Batch `step`, placed; each process builds its own rows where the source can."""
    if mesh is None or jax.process_count() == 1 or not hasattr(batches, "part"):
        return placed(batches[step], mesh)
    where = batch_sharding(mesh)
    part, rows = batches.part(step, functools.partial(own_rows, where))
    return place_rows(part, where, rows)


def abstract(leaf: Array) -> jax.ShapeDtypeStruct:
    """What a checkpoint is restored into: shape, type and placement without the values."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
