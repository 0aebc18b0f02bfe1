"""The programs that an experiment runs on devices, over abstract arrays: the real ones, with nothing in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jraggym import steps
from jraggym.batch import ProcessBatch
from jraggym.episodes import Rules
from jraggym.errors import InputError
from jraggym.experience import PPO, grpo_experience, ppo_experience_maker
from jraggym.labelling import support_judge
from jraggym.models.critic import critic_specs
from jraggym.models.decoder import specs
from jraggym.models.lora import lora_specs
from jraggym.objectives.policy import Experience
from jraggym.planning.abstract import abstract_weights, cache_bytes, check_parts, empty_batch, spread
from jraggym.recipes.collecting import Collect
from jraggym.recipes.experiment import Devices, Experiment, critic_table
from jraggym.recipes.offline import CriticTraining, Dpo, Sft, objective_of, reference_program, reference_rows
from jraggym.recipes.online import Grpo, Ppo, check_rewards
from jraggym.rollout import Policy, Rollout
from jraggym.sampling import Sampling
from jraggym.sharding import batch_shards, make_mesh
from jraggym.steps import Network
from jraggym.text.batching import buckets
from jraggym.training import Optimization, Step, abstract_state


@dataclass(frozen=True)
class Program:
    """One program, and what is in memory while it runs."""

    name: str
    trace: Callable[[], Any]
    held: Mapping[str, Any]  # abstract trees, by the part of memory that they are
    tokens: int  # places for tokens in its batch, padding included
    cache: int = 0  # bytes of keys and values on each device
    trips: tuple[int, ...] = ()  # of loops that end when the data says so: the most
    rows: int = 0  # that --parts splits
    runs: int = 1  # in an iteration of training: at most; 0 for what runs before the first
    devices: Devices | None = None  # where it runs, if not on the mesh of the experiment


def programs(experiment: Experiment, mesh: Mesh) -> list[Program]:
    """All programs of an experiment on a mesh. Raises InputError for a kind that cannot be planned yet."""
    kinds: dict[type, Callable[[Any, Mesh], list[Program]]] = {
        **dict.fromkeys((Sft, Dpo, CriticTraining), _offline),
        **dict.fromkeys((Grpo, Ppo), _online),
        Collect: lambda given, where: [_rollout(given, where, given.settings.candidates, given.settings.episodes)],
    }
    if type(experiment) not in kinds:
        remedy = f"Plan one of {', '.join(kind.__name__ for kind in kinds)}."
        raise InputError("there is no plan for this experiment", got=type(experiment).__name__, remedy=remedy)
    return kinds[type(experiment)](experiment, mesh)


def left_out(experiment: Experiment) -> str:
    """What a run of the experiment computes beside its `programs`."""
    if isinstance(experiment, Collect):
        return "nothing"
    if isinstance(experiment, CriticTraining):
        return "the critic's agreement with held-out labels"
    moved = isinstance(experiment, Grpo | Ppo) and experiment.rollouts_on != experiment.devices
    return "greedy rollouts of the evaluation" + (", moving the weights to the mesh of the rollouts" if moved else "")


def without_recomputation(experiment: Experiment) -> Experiment:
    """The same experiment where no product is computed twice to save memory."""
    model = replace(experiment.settings.model, remat="none")
    return replace(experiment, parts=1, settings=replace(experiment.settings, model=model))


@dataclass(frozen=True)
class _Models:
    """The weights of an experiment as abstract arrays on a mesh."""

    net: Network
    weights: Any
    frozen: Any


def _models(experiment: Experiment, mesh: Mesh) -> _Models:
    config = experiment.settings.model
    lora = experiment.lora if experiment.lora.rank else None
    net = Network(config, lora, experiment.parts, mesh)
    frozen = abstract_weights(specs(config), mesh)
    weights = frozen if lora is None else abstract_weights(lora_specs(config, lora), mesh)
    return _Models(net, weights, frozen)


def _tokens(batch: ProcessBatch) -> int:
    return batch.prompt.size + batch.action.size


class _Update:
    """A step on a batch: its state, and how it is traced."""

    def __init__(self, objective: Any, optimization: Optimization, weights: Any, batch: Any, frozen: Any):
        optimizer = optimization.build()
        self.state = abstract_state(weights, optimizer)
        self._step, self._batch, self._frozen = Step(objective, optimizer), batch, frozen

    def trace(self) -> Any:
        return self._step.program(self.state).trace(self.state, self._batch, self._frozen, 0)

    def program(self, name: str, tokens: int, more: Mapping[str, Any], **count: int) -> Program:
        held = {"weights": self.state.weights, "optimiser": self.state.optimizer, "frozen": self._frozen}
        return Program(name, self.trace, {**held, "batch": self._batch, **more}, tokens, **count)  # type: ignore[arg-type]


def _offline(experiment: Sft | Dpo | CriticTraining, mesh: Mesh) -> list[Program]:
    models, settings = _models(experiment, mesh), experiment.settings
    rows = (settings.states, settings.max_prompt, settings.max_action, settings.contrasts)
    if isinstance(experiment, Sft) and experiment.data is None:  # whole demonstrations; the largest batches
        bucket = max(buckets(settings.edges, settings.tokens, 1), key=lambda b: b.rows * (b.prompt + b.action))
        rows = (bucket.rows, bucket.prompt, bucket.action, 1)
    check_parts(rows[0], experiment.parts, mesh)
    batch, before = empty_batch(*rows), []
    if isinstance(experiment, Dpo) and experiment.keep_reference:
        before = [_reference(models, rows[1:], mesh)]
        batch = batch.replace(reference_logprob=batch.behaviour_logprob)  # type: ignore[attr-defined]
    weights = models.weights
    if isinstance(experiment, CriticTraining):
        table = critic_table(models.net, likelihood=experiment.likelihood)
        weights = abstract_weights(table, mesh)
    objective = objective_of(experiment, models.net)
    update = _Update(objective, experiment.optimization, weights, spread(batch, mesh), models.frozen)
    return [*before, update.program("step", _tokens(batch), {}, rows=rows[0])]


def _reference(models: _Models, sizes: tuple[int, int, int], mesh: Mesh) -> Program:
    """What runs over all data before DPO's first step."""
    batch = empty_batch(reference_rows(mesh), *sizes)
    given, run = spread(batch, mesh), reference_program(models.net)
    held = {"frozen": models.frozen, "batch": given}
    if models.net.lora is not None:
        held["weights"] = models.weights
    return Program("reference", lambda: run.trace(models.frozen, given), held, _tokens(batch), runs=0)


def _online(experiment: Grpo | Ppo, mesh: Mesh) -> list[Program]:
    """The rollout, the experience that is made of it, and the updates. All states lie in memory all the time."""
    check_rewards(experiment)
    models, schedule, how = _models(experiment, mesh), experiment.schedule, experiment.algorithm
    check_parts(schedule.rows, experiment.parts, mesh)
    sizes = (schedule.prompt, schedule.action, schedule.candidates)
    every, batch = (empty_batch(rows, *sizes) for rows in (schedule.rows * schedule.updates, schedule.rows))
    values, fresh = batch.behaviour_logprob, spread(every, mesh)
    ppo = values if isinstance(how, PPO) else None
    made = Experience(batch, values, values, values if how.loss.kl_weight else None, ppo, ppo)
    part, tokens = spread(made, mesh), _tokens(batch)
    makers = replace(models.net, parts=experiment.parts * schedule.updates)
    policy = _Update(steps.policy(models.net, how.loss), experiment.optimization, models.weights, part, models.frozen)
    state, updates, others = policy.state, [], {}
    count = {"rows": schedule.rows, "runs": schedule.updates * schedule.epochs}
    rollout_mesh = mesh
    if (elsewhere := experiment.rollouts_on) != experiment.devices:
        rollout_mesh = make_mesh(elsewhere.data, elsewhere.fsdp, elsewhere.tensor, list(mesh.devices.flat))
    if experiment.rewards == "critic":  # one as train.critic makes it
        others["reward critic"] = abstract_weights(critic_specs(models.net.config, likelihood=True), rollout_mesh)
    make: Any
    given: tuple[Any, ...] = (fresh,)
    weights: tuple[Any, ...] = (models.weights,)
    if isinstance(how, PPO):
        assert isinstance(experiment, Ppo)
        objective = steps.value(models.net, clip=how.value_clip, leaky=how.leaky)
        table = abstract_weights(critic_table(models.net), mesh)
        value = _Update(objective, experiment.value_optimization, table, part, models.frozen)
        beside = {"policy": (state.weights, state.optimizer), **others}
        updates = [value.program("value step", tokens, beside, **count)]
        others["value function"] = (value.state.weights, value.state.optimizer)
        make, weights = ppo_experience_maker(makers, how), (models.weights, table)
        given = (fresh, jax.ShapeDtypeStruct((), jnp.float32))
    else:
        make = grpo_experience(makers, how)
    held = {"weights": state.weights, "optimiser": state.optimizer, "frozen": models.frozen, **others}
    acting = {}
    if models.net.lora or rollout_mesh is not mesh:  # a merged or moved copy of the weights
        acting = {"rollout actor": abstract_weights(specs(models.net.config), rollout_mesh)}
    return [
        _sampled(experiment, rollout_mesh, {**held, **acting}),
        Program(
            "experience",
            lambda: make.trace(*weights, models.frozen, *given),
            {**held, "batch": fresh},
            _tokens(every),
            rows=schedule.rows,
        ),
        policy.program("policy step", tokens, others, **count),
        *updates,
    ]


def _sampled(experiment: Grpo | Ppo, mesh: Mesh, held: Mapping[str, Any]) -> Program:
    """The rollout of an iteration, which samples as its Gatherer does."""
    copies = experiment.schedule.candidates
    drawn, episodes = (1, experiment.questions * copies) if experiment.whole else (copies, experiment.questions)
    judged = experiment.rewards in ("process", "steps")
    one = _rollout(experiment, mesh, drawn, experiment.slots, judged=judged, resident=held)
    elsewhere = experiment.rollouts_on if experiment.rollouts_on != experiment.devices else None
    return replace(one, runs=experiment.settings.max_turns * -(-episodes // experiment.slots), devices=elsewhere)


class _Retriever:
    """A host's index as the device knows it: ids of queries go in, vectors come out.

    Its encoder is one table of word vectors: the weights of a real one are nothing beside a policy's.
    """

    width, words, dim = 64, 32_768, 384

    def tokenize(self, queries: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        return np.zeros((len(queries), self.width), np.int32), np.zeros((len(queries), self.width), bool)

    def encode(self, params: Any, ids: Any, mask: Any) -> Any:
        return jnp.sum(jnp.where(mask[..., None], params[ids], 0.0), axis=1)


@dataclass(frozen=True)
class _Codec:
    """What a rollout's program takes of a codec."""

    max_prompt: int
    stops: tuple[int, ...] = (0,)


def _rollout(
    experiment: Experiment,
    mesh: Mesh,
    candidates: int,
    slots: int,
    *,
    judged: bool = True,
    resident: Mapping[str, Any] | None = None,
) -> Program:
    """One turn of all episodes: prefill, the longest actions, and the calls of the host."""
    settings, models = experiment.settings, _models(experiment, mesh)
    if slots % batch_shards(mesh):
        remedy = "Choose a multiple (--slots, --settings.episodes), or another mesh."
        raise InputError(f"episodes cannot be split over data * fsdp = {batch_shards(mesh)}", got=slots, remedy=remedy)
    config, retriever = settings.model, _Retriever()
    sampling = Sampling(candidates, settings.max_action, settings.temperature)
    rules = Rules(settings.max_turns, judge=support_judge if judged else None)
    codec: Any = _Codec(settings.max_prompt)
    rollout = Rollout(config, codec, retriever, sampling, rules, batch=slots, mesh=mesh)  # type: ignore[arg-type]
    whole = NamedSharding(mesh, PartitionSpec())
    encoder = jax.ShapeDtypeStruct((retriever.words, retriever.dim), jnp.float32, sharding=whole)
    keys = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct((), keys.dtype, sharding=whole)
    held = resident or {"weights": models.frozen}
    policy = Policy(config, models.frozen, held.get("reward critic"))
    tokens = slots * (settings.max_prompt + candidates * settings.max_action)
    return Program(
        "rollout, one turn",
        lambda: rollout.trace(policy, encoder, key),
        held,
        tokens,
        cache_bytes(config, slots, settings.max_prompt, candidates * settings.max_action, mesh),
        trips=(1, settings.max_action),
    )
