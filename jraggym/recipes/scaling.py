"""What more data and more candidates bring: one actor, critics of growing sets of questions, growing best of N."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from jraggym.errors import InputError
from jraggym.evaluation import Row
from jraggym.models.critic import Critic
from jraggym.models.decoder import Decoder
from jraggym.recipes.quickstart import Workshop, collect_round, collector, train_critic
from jraggym.recipes.rows import Agent, Evaluator
from jraggym.recipes.settings import Settings
from jraggym.whole import write_whole


@dataclass(frozen=True)
class Scale:
    """The points of the two curves; the other quantity is at `Settings.candidates` or at the most questions."""

    questions: tuple[int, ...] = (70, 140, 280, 560)
    """How many questions the critic learns from; the first so many of one collection."""
    candidates: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Of how many samples the critic picks one, at every state."""

    def __post_init__(self) -> None:
        for name in ("questions", "candidates"):
            points = getattr(self, name)
            if len(points) < 2 or points[0] < 1 or list(points) != sorted(set(points)):
                raise InputError(f"{name} must be two or more rising numbers", got=points, remedy="Use 70 140 280 560.")


def scaling_settings(settings: Settings, scale: Scale) -> Settings:
    """The settings with as many collected questions as the largest critic learns from."""
    return dataclasses.replace(settings, collected=scale.questions[-1])


def measure(shop: Workshop, start: Decoder, scale: Scale) -> dict[str, dict[int, np.ndarray]]:
    """Gives {"questions": {n: em [questions]}, "candidates": {K: em}, "greedy": {0: em}} on the test questions.

    All critics start from the actor `start` and are trained for the same number of steps. What is finished is kept in
    `shop.out`: a collection by chunks, a critic by checkpoints, and the scores of each point.
    """
    settings = shop.settings
    fresh = shop.task.train.examples[settings.demonstrations :][: settings.collected]
    if len(fresh) < scale.questions[-1]:
        raise InputError("too few questions", got=len(fresh), remedy=f"Collect {scale.questions[-1]}.")
    records = collect_round(shop, "states", start, fresh, collector(shop))
    critics: dict[int, Critic] = {}
    for number in scale.questions:
        known = {example.id for example in fresh[:number]}
        part = [record for record in records if record.example_id in known]
        critics[number] = train_critic(shop, f"critic of {number} questions", start, part)
    many = settings.candidates
    greedy = Agent("greedy", "baseline", "the actor alone", start)
    most = critics[scale.questions[-1]]
    return {
        "greedy": {0: _em(shop, greedy)},
        "questions": {
            number: _em(shop, _best(start, critic, f"best of {many}, {number} questions"))
            for number, critic in critics.items()
        },
        "candidates": {
            k: _em(_sampling(shop, k), _best(start, most, f"best of {k}, {scale.questions[-1]} questions"))
            for k in scale.candidates
        },
    }


def _best(start: Decoder, critic: Critic, name: str) -> Agent:
    return Agent(name, "trained", "the critic picks each action", start, critic, "score", "K samples")


def _sampling(shop: Workshop, candidates: int) -> Workshop:
    return dataclasses.replace(shop, settings=dataclasses.replace(shop.settings, candidates=candidates))


def _em(shop: Workshop, agent: Agent) -> np.ndarray:
    """The agent's EM on each test question, read where an earlier call has left it."""
    path = shop.out / "points" / f"{agent.name}.json"
    if not path.exists():
        total = len(shop.task.test.examples)
        evaluator = Evaluator(shop, shop.task.test, shop.test_retriever)
        row: Row = evaluator.score(agent, evaluator.run(agent, partial(_report, shop.progress, agent.name, total)))
        write_whole(path, json.dumps(row.em.tolist()))
    return np.array(json.loads(path.read_text()))


def _report(progress: Callable, name: str, total: int, done: int) -> None:
    progress(name, done, total, None)


def pooled_mean(runs: Sequence[np.ndarray], samples: int = 2_000) -> tuple[float, float, float]:
    """(mean, low, high) of per-question scores [questions] over runs, which all count alike: 95 %, by questions."""
    rng = np.random.default_rng(0)
    drawn = [run[rng.integers(0, len(run), (samples, len(run)))].mean(axis=1) for run in runs]
    low, high = np.quantile(np.mean(drawn, axis=0), [0.025, 0.975])
    return float(np.mean([run.mean() for run in runs])), float(low), float(high)
