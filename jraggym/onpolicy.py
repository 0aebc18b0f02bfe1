"""On-policy training, GRPO and PPO alike:

    for each iteration:   roll out the present policy -> rewards -> experience -> epochs of jitted steps

Everything is a pure function of (settings, iteration, weights), so a killed run that is called again ends with the same
bits. Sampler and trainer compute the same log-probabilities by different programs: how far they differ is reported at
every iteration, and a gap that grows means that the gradient is no longer on-policy.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array
from jax.sharding import Mesh

from jraggym import steps
from jraggym.batch import ProcessBatch
from jraggym.checkpoint import Checkpointer
from jraggym.clock import spent
from jraggym.errors import InputError
from jraggym.experience import GRPO, PPO, grpo_experience, ppo_experience_maker
from jraggym.gathering import Gather, Gathered
from jraggym.history import History, Tell
from jraggym.meter import Meter
from jraggym.models.critic import Critic
from jraggym.models.decoder import specs
from jraggym.models.lora import merge
from jraggym.objectives.policy import Experience
from jraggym.preemption import Preempted, should_stop
from jraggym.rollout import Policy
from jraggym.sharding import batch_sharding, own_rows, place, place_rows, shardings, whole_on
from jraggym.steps import Network
from jraggym.text.batching import EMPTY_ROW, Row, collate
from jraggym.training import Optimization, TrainState, abstract, init_state, placed, shared_step
from jraggym.watch import Watch


@dataclass(frozen=True)
class Schedule:
    """How much is sampled and how often it is used. Each update reads `rows` groups of one iteration."""

    iterations: int = 20
    updates: int = 2  # in an epoch; an iteration uses at most rows * updates groups, drawn at random from its own
    rows: int = 32
    epochs: int = 1
    prompt: int = 144  # P
    action: int = 16  # A; of whole episodes if these are the groups
    candidates: int = 8  # K

    @property
    def total_steps(self) -> int:
        return self.iterations * self.epochs * self.updates


@dataclass(frozen=True)
class OnPolicy:
    """One on-policy run. Under LoRA the trained weights are adapters, and `frozen` is base and reference in one."""

    net: Network
    algorithm: GRPO | PPO
    optimization: Optimization  # its steps are those of the schedule
    gather: Gather
    schedule: Schedule
    frozen: Any = None  # the reference, where the algorithm needs one; the base under LoRA
    value_optimization: Optimization | None = None  # PPO
    reward_critic: Critic | None = None  # scores the candidates instead of a judge (RAG-Gym's PPO)
    seed: int = 0
    mesh: Mesh | None = None
    rollout_mesh: Mesh | None = None  # where the policy acts, if elsewhere


@struct.dataclass
class OnPolicyState:
    """Everything that an iteration changes."""

    policy: TrainState
    value: TrainState | None
    kl_weight: Array  # f32, of the KL in PPO's reward


def train_on_policy(
    job: OnPolicy,
    weights: Any,
    value_weights: Critic | None = None,
    checkpointer: Checkpointer | None = None,
    *,
    every: int = 5,
    report: Tell | None = None,
    evaluate: Callable[[int, Policy], None] | None = None,
    meter: Meter | None = None,
) -> OnPolicyState:
    """Runs all iterations and returns the final state; resumes from the newest whole checkpoint.

    Saves after every `every` iterations, at the end, and when a signal asks the job to end (`Preempted`): a rollout
    under way is then given up. `report` gets (iterations done, metrics) of each once, also of those before a
    checkpoint; `evaluate` gets (iterations done, policy) at the start, after every `every` iterations and at the end.
    `meter` measures the iterations. Raises InputError when a metric is not finite, naming the step; the last
    checkpoint stays as it is.
    """
    _check(job, value_weights)
    state, history, saved, evaluated = _start(job, weights, value_weights), History(report), 0, False
    if checkpointer is not None and checkpointer.latest() is not None:
        state, data = checkpointer.restore(jax.tree.map(abstract, state))
        history.restore(data.get("history"))
        saved, evaluated = data["iteration"], data.get("evaluated", True)

    def save(iteration: int) -> None:
        nonlocal saved
        if checkpointer is not None and iteration > saved:
            saved = iteration
            data = {"iteration": iteration, "evaluated": evaluated, "history": history.saved()}
            with spent("checkpoint"):
                checkpointer.save(iteration, state, data)

    with meter or Meter() as cost:
        for iteration in range(saved, job.schedule.iterations + 1):
            last = iteration == job.schedule.iterations
            try:
                if last or iteration % every == 0:
                    if evaluate is not None and not evaluated:
                        with spent("evaluate"):
                            evaluate(iteration, policy_of(job, state))
                    evaluated = True
                    save(iteration)
                if last:
                    break
                if should_stop():
                    raise Preempted
                with spent("rollout"):
                    gathered = job.gather(policy_of(job, state), iteration)
            except Preempted:
                save(iteration)
                raise
            with spent("compute"):
                state, metrics = _improve(job, state, gathered, iteration)
            evaluated = False
            cost.step(iteration + 1, gathered.tokens)
            history.add(iteration + 1, {**gathered.metrics, "sampled_tokens": float(gathered.tokens), **metrics})
    return state


def _check(job: OnPolicy, value_weights: Critic | None) -> None:
    if isinstance(job.algorithm, PPO) and (value_weights is None or job.value_optimization is None):
        raise InputError("PPO needs a value function", got="none", remedy="Give value weights and their optimization.")
    if job.algorithm.needs_reference and job.frozen is None:
        raise InputError("a KL term needs a reference", got="frozen=None", remedy="Give the starting weights.")


def _start(job: OnPolicy, weights: Any, value_weights: Critic | None) -> OnPolicyState:
    value = None
    if value_weights is not None and isinstance(job.algorithm, PPO):
        value = init_state(value_weights, _optimization(job, job.value_optimization).build())
    kl_weight = job.algorithm.reward_kl_weight if isinstance(job.algorithm, PPO) else 0.0
    policy = init_state(weights, _optimization(job, job.optimization).build())
    return OnPolicyState(policy, value, _scalar(job, kl_weight))


def _scalar(job: OnPolicy, value: float) -> Array:
    """A number of the state, on all devices of the job."""
    number = jnp.float32(value)
    return number if job.mesh is None else place(number, whole_on(job.mesh))


def _optimization(job: OnPolicy, optimization: Optimization | None) -> Optimization:
    assert optimization is not None
    return replace(optimization, steps=job.schedule.total_steps)


def policy_of(job: OnPolicy, state: OnPolicyState) -> Policy:
    """Who samples: the trained weights, under LoRA merged into their base, on the mesh of the rollouts."""
    actor = state.policy.weights
    if job.net.lora is not None:
        actor = _merged(job.frozen, actor, job.net.lora)
    if job.rollout_mesh not in (None, job.mesh):
        actor = place(actor, shardings(specs(job.net.config), job.rollout_mesh))
    return Policy(job.net.config, actor, job.reward_critic)


def _improve(
    job: OnPolicy, state: OnPolicyState, gathered: Gathered, iteration: int
) -> tuple[OnPolicyState, dict[str, float]]:
    """All epochs on one iteration's groups."""
    batch, too_long = _batch(job.schedule, gathered.rows, (job.seed, iteration), job.mesh)
    experience, sampled = _experience(job, state, batch)
    metrics = {name: float(x) for name, x in sampled.items()} | {"too_long": float(too_long)}
    policy, value, means = _epochs(job, state, experience, iteration)
    kl_weight = float(state.kl_weight)
    if isinstance(job.algorithm, PPO) and job.algorithm.adaptive.target:
        kl_weight = job.algorithm.adaptive.update(kl_weight, metrics["sequence_kl"], int(metrics["sequences"]))
        metrics["kl_weight"] = kl_weight
    return OnPolicyState(policy, value, _scalar(job, kl_weight)), metrics | means


def _epochs(
    job: OnPolicy, state: OnPolicyState, experience: Experience, iteration: int
) -> tuple[TrainState, TrainState | None, dict[str, float]]:
    """The updates on one experience, and the means of their metrics."""
    schedule, watch, seen = job.schedule, Watch(), []
    policy, value = state.policy, state.value
    policy_step = shared_step(steps.policy(job.net, job.algorithm.loss), _optimization(job, job.optimization))
    for epoch in range(schedule.epochs):
        order = np.random.default_rng((job.seed, iteration, epoch)).permutation(schedule.rows * schedule.updates)
        for update in range(schedule.updates):
            part = placed(_pick(experience, order[update * schedule.rows :][: schedule.rows]), job.mesh)
            number = (iteration * schedule.epochs + epoch) * schedule.updates + update
            policy, found = policy_step(policy, part, job.frozen, job.seed)
            if value is not None and isinstance(job.algorithm, PPO):
                objective = steps.value(job.net, clip=job.algorithm.value_clip, leaky=job.algorithm.leaky)
                value_step = shared_step(objective, _optimization(job, job.value_optimization))
                value, fitted = value_step(value, part, job.frozen, job.seed)
                found = found | {"value_loss": fitted["loss"], "explained": fitted["explained"]}
            watch.look(number, found)
            seen.append(found)
    watch.finish()
    return policy, value, {name: float(np.mean([float(found[name]) for found in seen])) for name in seen[0]}


def _experience(job: OnPolicy, state: OnPolicyState, batch: ProcessBatch) -> tuple[Experience, dict[str, Array]]:
    net = replace(job.net, parts=job.net.parts * job.schedule.updates)
    if isinstance(job.algorithm, GRPO):
        return _grpo(net, job.algorithm)(state.policy.weights, job.frozen, batch)
    assert state.value is not None
    make = _ppo(net, job.algorithm)
    return make(state.policy.weights, state.value.weights, job.frozen, batch, state.kl_weight)


_merged = jax.jit(merge, static_argnums=2)
_grpo, _ppo = functools.cache(grpo_experience), functools.cache(ppo_experience_maker)
_pick = jax.jit(lambda experience, rows: jax.tree.map(lambda x: x[rows], experience))


def _batch(
    schedule: Schedule, rows: Sequence[Row], seed: tuple[int, int], mesh: Mesh | None
) -> tuple[ProcessBatch, int]:
    """Exactly rows * updates groups, on their devices, and how many did not fit (P, A).

    A random part of the fitting ones, or all of them and then empty ones that no objective reads. Where all rewards
    are equal, or no candidate is good, there is no group: such an iteration teaches nothing, and the run goes on.
    """
    size, limit = schedule.rows * schedule.updates, (schedule.prompt, schedule.action)
    fitting = [row for row in rows if row.sizes[0] <= limit[0] and row.sizes[1] <= limit[1]]
    if rows and not fitting:
        got = f"{len(rows)} groups, none within {limit} tokens"
        raise InputError("no group fits the schedule", got=got, remedy="Widen its prompt and action.")
    order = np.random.default_rng((*seed, 2**31)).permutation(len(fitting))[:size]
    chosen = [fitting[i] for i in order]
    chosen += [EMPTY_ROW] * (size - len(chosen))
    shape: dict[str, Any] = {"prompt": schedule.prompt, "action": schedule.action, "candidates": schedule.candidates}
    too_long = len(rows) - len(fitting)
    if mesh is None:
        return collate(chosen, **shape), too_long
    where = batch_sharding(mesh)
    return place_rows(collate(chosen, **shape, only=own_rows(where, size)), where, size), too_long
