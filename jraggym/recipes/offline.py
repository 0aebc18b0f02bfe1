"""Training on stored data: SFT, DPO and the critic, each from a starting model to a model."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, cast

import jax
import numpy as np
from jax.sharding import Mesh

from jraggym import steps
from jraggym.checkpoint import Checkpointer
from jraggym.data.lazy import Items, Lazy, chosen
from jraggym.data.process import ProcessRecord, open_dataset
from jraggym.errors import InputError
from jraggym.hosts import agreed, fetch, lead, share, surveyed
from jraggym.meter import Meter
from jraggym.model_folder import Model
from jraggym.objectives.agreement import Agreement, agreement
from jraggym.recipes.bench import Bench, left_out
from jraggym.recipes.experiment import (
    Exam,
    Experiment,
    Log,
    Placed,
    as_model,
    critic_on,
    critic_table,
    placed_decoder,
)
from jraggym.recipes.labelling import judged
from jraggym.recipes.quickstart import (
    Workshop,
    batches_in_order,
    demonstrations,
    labelled,
    preferences,
    shuffled,
    successful,
    warm_start_data,
    warm_start_weights,
)
from jraggym.sharding import split_over
from jraggym.steps import Network
from jraggym.text.batching import Row
from jraggym.training import BatchSource, Objective, Optimization, Run, fit

COLLECTED = Path("runs/collect/data/data/dataset")  # where train.collect leaves its dataset


@dataclass(frozen=True)
class Sft(Experiment):
    """Supervised fine-tuning, on the world's demonstrations or on the good actions of collected data."""

    model: Path | None = None
    """Folder of the starting actor; without one it starts from random weights."""
    data: Path | None = None
    """Dataset of train.collect; without one the demonstrations of the world are imitated."""
    optimization: Optimization = field(default_factory=lambda: Optimization(560, rate=6e-3, warmup=20))
    weighted: bool = False
    """Every candidate, weighted by its reward, instead of the good ones alone."""

    of_chats: ClassVar[bool] = True


@dataclass(frozen=True)
class Dpo(Experiment):
    """Preference optimisation over all good x worse candidates of a state."""

    model: Path = Path("runs/sft/model")
    data: Path = COLLECTED
    optimization: Optimization = field(default_factory=lambda: Optimization(80, 0.0, rate=5e-4, warmup=10))
    beta: float = 0.1
    ipo: bool = False
    smoothing: float = 0.0
    per_token: bool = False
    nll: float = 1.0
    below: float = 0.75
    keep_reference: bool = True
    """Compute the reference's log-probabilities once and keep them beside the data, instead of at every step."""

    of_chats: ClassVar[bool] = True


@dataclass(frozen=True)
class CriticTraining(Experiment):
    """A process reward model from the ranked candidates of a state; a tenth of the questions is held out."""

    model: Path = Path("runs/sft/model")
    data: Path = COLLECTED
    optimization: Optimization = field(default_factory=lambda: Optimization(160, 0.0, rate=1e-3, warmup=10))
    pairwise: float = 1.0
    listwise: float = 0.0
    pointwise: float = 0.5
    below: float = 0.75
    centre: float = 0.0
    soft: bool = False
    any_label: bool = False
    """Learn from every labelled candidate, as labels that are no ranks need it, and not only from states with a good
    candidate beside a worse one. Goes with --pairwise 0 --listwise 1 --soft."""
    likelihood: bool = True
    """Add the trunk's own log-probability of the action to the score; see models/critic.py."""

    of_chats: ClassVar[bool] = True


def objective_of(experiment: Sft | Dpo | CriticTraining, net: Network) -> Objective:
    """What the experiment's steps minimise."""
    if isinstance(experiment, Sft):
        return steps.sft(net, weighted=experiment.weighted)
    if isinstance(experiment, Dpo):
        names = ("beta", "ipo", "smoothing", "per_token", "nll", "below")
        return steps.dpo(net, **{name: getattr(experiment, name) for name in names})
    names = ("pairwise", "listwise", "pointwise", "below", "centre", "soft")
    return steps.critic(net, **{name: getattr(experiment, name) for name in names})


def train_sft(experiment: Sft, shop: Bench, start: Model | None, log: Log) -> tuple[Model, dict[str, Any]]:
    """Returns the actor and its evaluation, which is empty without a world."""
    world = cast(Workshop, shop)  # there is one unless the experiment has a starting model and data
    ready = placed_decoder(experiment, shop, start.weights if start else warm_start_weights(world))
    told: dict[str, Any] = {}
    if experiment.data is None:
        # Of a whole episode most tokens are what came back.
        batches, share = warm_start_data(world, demonstrations(world)), 0.5 if shop.codec.appends else 1.0
    else:
        records = successful(open_dataset(experiment.data))
        batches, share, told = labelled(shop, records), 1.0, left_out(shop, records)
    ready = dataclasses.replace(ready, net=dataclasses.replace(ready.net, share=share))
    model, result = _actor(experiment, shop, ready, batches, log)
    return model, result | told


def train_dpo(experiment: Dpo, shop: Bench, start: Model, log: Log) -> tuple[Model, dict[str, Any]]:
    """Returns the actor and its evaluation, which is empty without a world."""
    ready = placed_decoder(experiment, shop, start.weights)
    records = successful(open_dataset(experiment.data))
    rows = preferences(shop, records)
    if experiment.keep_reference:
        rows = with_reference(shop, ready, rows)
    model, result = _actor(experiment, shop, ready, shuffled(shop, rows), log)
    return model, result | left_out(shop, records)


def _run(experiment: Sft | Dpo | CriticTraining, ready: Placed, batches: BatchSource) -> Run:
    objective, plain = (objective_of(experiment, net) for net in (ready.net, ready.net.plain))
    return Run(objective, experiment.optimization, batches, ready.frozen, experiment.seed, ready.mesh, plain)


def _actor(
    experiment: Sft | Dpo, shop: Bench, ready: Placed, batches: BatchSource, log: Log
) -> tuple[Model, dict[str, Any]]:
    run = _run(experiment, ready, batches)
    trained = fit_logged(experiment, shop, run, ready.weights, log)
    weights = ready.whole(trained)
    result = Exam(experiment, shop, ready.mesh).score(weights) if isinstance(shop, Workshop) else {}
    return as_model(shop, "actor", weights, result, ready.adapters(trained)), result


def fit_logged(experiment: Experiment, shop: Bench, run: Run, weights: Any, log: Log) -> Any:
    """Trains one model in the job's folder, resumably, and logs every step."""
    name, total = type(experiment).__name__.lower(), run.optimization.steps

    def report(step: int, metrics: Mapping[str, Any]) -> None:
        shop.progress(name, step, total, metrics)
        log(name, step, metrics)

    meter = Meter(partial(log, "cost"), shop.out)
    return fit(run, weights, Checkpointer(shop.out / "checkpoints"), every=experiment.every, report=report, meter=meter)


def reference_rows(mesh: Mesh | None) -> int:
    """Rows whose reference is computed at a time."""
    return split_over(mesh, 16)


def reference_program(net: Network) -> Any:
    """The jitted (decoder, batch) -> log-probabilities [B, K, A]; so few rows need no micro-batches."""
    whole = dataclasses.replace(net, parts=1)
    return jax.jit(lambda weights, batch: whole.logprobs(weights, batch))


def with_reference(shop: Bench, ready: Placed, rows: Items[Row]) -> Items[Row]:
    """The rows with the frozen decoder's log-probabilities, computed once and kept in `out`/reference-*.npy."""

    def digest(i: int) -> bytes:
        return hashlib.sha256(repr((rows[i].prompt, rows[i].actions)).encode()).digest()

    whole = hashlib.sha256(b"".join(surveyed(len(rows), digest))).hexdigest()[:16]
    path = shop.out / f"reference-{whole}.npy"
    if not agreed(path.exists()):
        run, size, found = reference_program(ready.net), reference_rows(ready.mesh), []
        for batch in batches_in_order(shop, rows, size, ready.mesh):
            found.append(np.asarray(fetch(run(ready.frozen, batch))))
            shop.progress("reference", min(size * len(found), len(rows)), len(rows), None)
        if lead():
            scratch = path.with_name(path.stem + ".tmp.npy")
            np.save(scratch, np.concatenate(found)[: len(rows)])
            scratch.replace(path)
        share(None)  # it is written
    kept = np.load(path, mmap_mode="r")
    return Lazy(len(rows), lambda i: dataclasses.replace(rows[i], reference=kept[i].tolist()))


def train_critic_model(experiment: CriticTraining, shop: Bench, start: Model, log: Log) -> tuple[Model, dict[str, Any]]:
    """Returns the critic, and how it agrees with the labels of the held-out questions."""
    ready = placed_decoder(experiment, shop, start.weights)
    table = critic_table(ready.net, likelihood=experiment.likelihood)
    critic = critic_on(ready, table, shop.key("critic"))
    records = open_dataset(experiment.data)
    learn, held = held_out(records)
    rows_of = judged if experiment.any_label else preferences
    run = _run(experiment, ready, shuffled(shop, rows_of(shop, learn)))
    critic = fit_logged(experiment, shop, run, critic, log)
    whole = dataclasses.replace(critic, trunk=ready.whole(critic.trunk))
    result = judge_agreement(shop, ready, whole, rows_of(shop, held)) | left_out(shop, records)
    return as_model(shop, "critic", whole, result, ready.adapters(critic.trunk, critic.head)), result


def judge_agreement(shop: Bench, ready: Placed, critic: Any, rows: Items[Row]) -> dict[str, Any]:
    """Pair accuracy, accuracy by rank distance and calibration on all rows; no pairs where one label stands alone."""
    net, size = dataclasses.replace(ready.net, lora=None), shop.settings.states
    count = jax.jit(lambda weights, batch: agreement(net.scores(weights, batch), batch))
    parts = [count(critic, batch) for batch in batches_in_order(shop, rows, size, ready.mesh)]
    total: Agreement = fetch(functools.reduce(operator.add, parts))
    return total.summary() if float(total.pairs.sum()) else {"pairs": 0}


def held_out(records: Items[ProcessRecord]) -> tuple[Items[ProcessRecord], Items[ProcessRecord]]:
    """The records of nine tenths of the questions, and those of the rest; InputError for fewer than ten questions."""
    asked = surveyed(len(records), lambda i: records[i].example_id)
    questions = sorted(set(asked))
    if len(questions) < 10:
        raise InputError("too few questions to hold some out", got=len(questions), remedy="Collect ten or more.")
    held = set(questions[::10])
    learn, rest = ([i for i, one in enumerate(asked) if (one in held) is out] for out in (False, True))
    return chosen(records, learn), chosen(records, rest)
