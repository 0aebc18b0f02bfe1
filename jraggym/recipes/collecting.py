"""Collecting process data with an actor: K labelled candidates for every state of its episodes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jraggym.data.process import ProcessRecord
from jraggym.model_folder import Model
from jraggym.recipes.experiment import Experiment, Log
from jraggym.recipes.quickstart import Workshop, collect_round, collector


@dataclass(frozen=True)
class Collect(Experiment):
    """Runs the actor on questions that it was not trained on; the judge ranks K samples, one of which is executed."""

    model: Path = Path("runs/sft/model")
    questions: int = 560
    select: str = "reward"
    """Which candidate is executed: reward (the judge's best) or first (a random sample: the actor's own episodes)."""
    skip: int = 0
    """Leave out so many questions behind the demonstrations, which an earlier collection used."""


def collect_data(experiment: Collect, shop: Workshop, start: Model, log: Log) -> tuple[None, dict[str, Any]]:
    """Writes `out`/data and returns what is in it."""
    examples = shop.task.train.examples
    fresh = examples[shop.settings.demonstrations + experiment.skip :] or examples[experiment.skip :]
    rollout = collector(shop, experiment.select, experiment.devices.mesh())
    records = collect_round(shop, "data", start.weights, fresh[: experiment.questions], rollout)
    rewards = [c.reward for record in records for c in record.candidates if c.reward is not None]
    found = {
        "states": len(records),
        "candidates": len(rewards),
        "sampled_tokens": sampled_tokens(records),
        "reward": float(np.mean(rewards)),
        "episode_em": float(np.mean([record.em for record in records if record.step == 0])),
        "data": str(shop.out / "data" / "data" / "dataset"),
    }
    log("collect", 0, {key: value for key, value in found.items() if isinstance(value, float | int)})
    return None, found


def sampled_tokens(records: Iterable[ProcessRecord]) -> int:
    """How many tokens the policy sampled for them, those of every candidate."""
    return sum(len(candidate.tokens) for record in records for candidate in record.candidates)
