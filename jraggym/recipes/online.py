"""On-policy training, from a starting actor to an actor: GRPO and PPO on fresh rollouts.

rewards    process    the judge's rewards for the K candidates of each visited state
           critic     a critic's scores for them (RAG-Gym's PPO); for new replies to recorded chats where dataset=agents
           outcome    the answer's F1, for K whole episodes of each question
           steps      the answer's F1, and the judge's rewards for every step inside whole episodes
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from jax.sharding import Mesh

from jraggym.checkpoint import Checkpointer
from jraggym.data.lazy import Lazy
from jraggym.data.process import open_dataset
from jraggym.episodes import Rules
from jraggym.errors import InputError
from jraggym.experience import GRPO, PPO
from jraggym.gathering import Gatherer
from jraggym.hosts import agreed, lead
from jraggym.meter import Meter
from jraggym.model_folder import Model
from jraggym.models.architecture import RUNTIME
from jraggym.models.critic import Critic
from jraggym.models.decoder import Decoder
from jraggym.onpolicy import OnPolicy, Schedule, train_on_policy
from jraggym.porting.pretrained import open_model
from jraggym.recipes.bench import Bench, record_row
from jraggym.recipes.experiment import (
    Devices,
    Exam,
    Experiment,
    Log,
    Placed,
    as_model,
    critic_on,
    critic_table,
    placed_decoder,
)
from jraggym.recipes.quickstart import Workshop
from jraggym.recorded_gathering import RecordedGatherer
from jraggym.rollout import Policy, Rollout
from jraggym.sampling import Sampling
from jraggym.sharding import split_over
from jraggym.text.chat import INSTRUCTION
from jraggym.training import Optimization
from jraggym.whole import write_whole

Score = Callable[[Decoder], dict[str, Any]]  # em, f1, each and more of an actor
REWARDS = ("process", "critic", "outcome", "steps")


def adamw(rate: float) -> Optimization:
    """AdamW at a rate that falls to 0 after three steps of warm-up."""
    # The experiment's schedule sets its steps. At a constant rate, agents that had learned fell back.
    return Optimization(1, matrix_rate=0.0, rate=rate, warmup=3, schedule="linear")


@dataclass(frozen=True)
class Sampled(Experiment):
    """The fields of all on-policy experiments."""

    model: Path = Path("runs/sft/model")
    """Folder of the starting actor."""
    rewards: str = "process"
    """process, critic, outcome or steps; see the top of this module."""
    critic: Path | None = None
    """Folder of the critic, for its scores as rewards."""
    data: Path | None = None
    """Dataset of an agent's chats, whose states are replied to anew (dataset=agents)."""
    questions: int = 20
    """Questions of an iteration, each asked `schedule.candidates` times where whole episodes are compared; of an
    agent's chats, states."""
    select: str = "reward"
    """Which candidate of a state is executed: reward (the judge's best) or first (a random sample)."""
    need_good: bool = True
    """Leave out states where no candidate has a process reward above 0.75, as the preference objectives do."""
    slots: int = 20
    """Episodes that run at the same time."""
    rollout_devices: Devices = field(default_factory=Devices)
    """The mesh of rollouts and evaluations, over the devices of training, whose weights are moved there; 1 x 1 x 1:
    that of training. Each token reads all weights: the fewer devices gather them, the better."""
    schedule: Schedule = field(default_factory=Schedule)
    optimization: Optimization = field(default_factory=lambda: adamw(3e-4))
    every: int = 5

    @property
    def title(self) -> str:
        return f"{super().title}, {self.rewards} rewards"

    of_chats: ClassVar[bool] = True

    @property
    def rollouts_on(self) -> Devices:
        """Where episodes run: `rollout_devices`, or the mesh of training."""
        return self.devices if self.rollout_devices == Devices() else self.rollout_devices

    @property
    def whole(self) -> bool:
        """Are the groups whole episodes?"""
        return self.rewards in ("outcome", "steps")


@dataclass(frozen=True)
class Grpo(Sampled):
    """Group-relative policy optimisation."""

    algorithm: GRPO = field(default_factory=GRPO)


@dataclass(frozen=True)
class Ppo(Sampled):
    """Proximal policy optimisation with a value function that starts from the actor's trunk."""

    algorithm: PPO = field(default_factory=PPO)
    value_optimization: Optimization = field(default_factory=lambda: adamw(1e-3))


def train_sampled(experiment: Grpo | Ppo, shop: Bench, start: Model, log: Log) -> tuple[Model, dict[str, Any]]:
    """Returns the actor and its curve: sampled tokens and greedy evaluation, at the start and each checkpoint.

    The curve is empty without a world.
    """
    check_rewards(experiment)
    ready, there = placed_decoder(experiment, shop, start.weights), experiment.rollouts_on.mesh()
    job = OnPolicy(
        ready.net,
        experiment.algorithm,
        experiment.optimization,
        _gatherer(experiment, shop, there) if isinstance(shop, Workshop) else _recorded(experiment, shop, there),
        experiment.schedule,
        ready.frozen,
        experiment.value_optimization if isinstance(experiment, Ppo) else None,
        _reward_critic(experiment.critic, shop, there),
        experiment.seed,
        ready.mesh,
        there,
    )
    score = Exam(experiment, shop, there).score if isinstance(shop, Workshop) else None
    return learn(experiment, job, shop, ready, score, log)


def learn(
    experiment: Experiment, job: OnPolicy, shop: Bench, ready: Placed, score: Score | None, log: Log
) -> tuple[Model, dict[str, Any]]:
    """Runs the job, resumably; returns the actor and its curve of what `score` gives at the start and checkpoints."""
    # A value function starts from the actor's trunk (from fresh adapters under LoRA).
    ppo = isinstance(job.algorithm, PPO)
    value = critic_on(ready, critic_table(ready.net), shop.key("value")) if ppo else None
    name, curve = type(experiment).__name__.lower(), Curve(shop.out / "curve.jsonl")
    points, spent = agreed(curve.points()), {0: 0.0}
    known = {point["iteration"] for point in points}

    def report(iteration: int, metrics: Mapping[str, float]) -> None:
        spent[iteration] = spent.get(iteration - 1, 0.0) + metrics["sampled_tokens"]
        shop.progress(name, iteration, job.schedule.iterations, metrics)
        log(name, iteration, metrics)

    def show(point: Mapping[str, Any]) -> None:
        tokens = point["sampled_tokens"]
        log("evaluation", point["iteration"], {"em": point["em"], "f1": point["f1"], "tokens": tokens})

    def evaluate(iteration: int, policy: Policy) -> None:
        if score is not None and iteration not in known:  # else a killed run was here: it would be the same again
            point = {"iteration": iteration, "sampled_tokens": spent.get(iteration, 0.0), **score(policy.actor)}
            if lead():
                curve.put(point)
            show(point)

    for point in points:
        show(point)
    checkpointer = Checkpointer(shop.out / "checkpoints")
    every = experiment.every
    meter = Meter(partial(log, "cost"), shop.out)
    state = train_on_policy(
        job, ready.weights, value, checkpointer, every=every, report=report, evaluate=evaluate, meter=meter
    )
    result = {"curve": agreed(curve.points())}
    trained, last = state.policy.weights, result["curve"][-1] if result["curve"] else {}
    return as_model(shop, "actor", ready.whole(trained), last, ready.adapters(trained)), result


def check_rewards(experiment: Sampled) -> None:
    """Raises InputError for unknown rewards, and where these and the critic do not belong together."""
    if experiment.rewards not in REWARDS:
        raise InputError("unknown rewards", got=experiment.rewards, remedy=f"Use one of {', '.join(REWARDS)}.")
    if (experiment.rewards == "critic") != (experiment.critic is not None):
        got = f"rewards={experiment.rewards}, critic={experiment.critic}"
        raise InputError("a critic goes with rewards=critic", got=got, remedy="Give both or none.")
    if experiment.worldless and experiment.rewards != "critic":
        remedy = "Give --rewards critic and --critic FOLDER."
        raise InputError("new replies to chats are known to a critic alone", got=experiment.rewards, remedy=remedy)


def _recorded(experiment: Grpo | Ppo, shop: Bench, mesh: Mesh | None) -> RecordedGatherer:
    records, schedule = open_dataset(experiment.data or ""), experiment.schedule
    sampling = Sampling(schedule.candidates, schedule.action, shop.settings.temperature)
    return RecordedGatherer(
        Lazy(len(records), lambda i: record_row(shop.codec, records[i], (), ()).prompt),
        shop.codec.stops,
        sampling,
        experiment.questions,
        split_over(mesh, experiment.slots),
        schedule.prompt,
        shop.settings.seed,
        mesh,
    )


def _reward_critic(folder: Path | None, shop: Bench, mesh: Mesh | None) -> Critic | None:
    if folder is None:
        return None
    found = open_model(folder, "critic", mesh)
    _same_words(found, shop)
    return found.weights


def _same_words(critic: Model, shop: Bench) -> None:
    """A critic reads the actor's tokens, and is run under the actor's configuration."""
    free = {name: getattr(shop.config, name) for name in ("tied", *RUNTIME)}
    fits = dataclasses.replace(critic.config, **free) == shop.config
    if not fits or critic.tokenizer.encode([INSTRUCTION]) != shop.tokenizer.encode([INSTRUCTION]):
        remedy = "Train it from the same actor with train.critic."
        raise InputError("the critic is of another kind of model than the actor", got=critic.config, remedy=remedy)


def _gatherer(experiment: Grpo | Ppo, shop: Workshop, mesh: Mesh | None) -> Gatherer:
    settings, schedule = shop.settings, experiment.schedule
    judge = shop.task.judge if experiment.rewards in ("process", "steps") else None
    select = experiment.select if experiment.rewards == "process" else "first"
    rules = Rules(settings.max_turns, "score" if experiment.rewards == "critic" else select, judge, seed=settings.seed)
    drawn = 1 if experiment.whole else schedule.candidates
    sampling = Sampling(drawn, settings.max_action, settings.temperature)
    slots, examples = experiment.slots, shop.task.train.examples
    fresh = examples[settings.demonstrations :] or examples
    return Gatherer(
        Rollout(shop.config, shop.codec, shop.train_retriever, sampling, rules, batch=slots, mesh=mesh),
        shop.codec,
        fresh,
        experiment.questions,
        shop.key("on-policy"),
        groups="episodes" if experiment.whole else "candidates",
        copies=schedule.candidates,
        need_good=experiment.need_good and experiment.rewards == "process",
        seed=settings.seed,
    )


@dataclass(frozen=True)
class Curve:
    """Points of a learning curve, one JSON line each, that a resumed run continues."""

    path: Path

    def points(self) -> list[dict[str, Any]]:
        """All points, by iteration."""
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        found = {point["iteration"]: point for point in map(json.loads, lines)}
        return [found[i] for i in sorted(found)]

    def put(self, point: dict[str, Any]) -> None:
        """Adds a point, in place of one of the same iteration."""
        found = {old["iteration"]: old for old in [*self.points(), point]}
        write_whole(self.path, "".join(json.dumps(found[i]) + "\n" for i in sorted(found)))
