"""Best of N whole episodes: the critic scores the steps of independent episodes, and one episode's answer is taken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from jraggym.environment import outcome
from jraggym.episodes import Rules
from jraggym.errors import InputError
from jraggym.metrics import bootstrap_interval
from jraggym.models.critic import Critic
from jraggym.models.decoder import Decoder
from jraggym.recipes.critic_exam import best_of, sizes
from jraggym.recipes.quickstart import Workshop
from jraggym.rollout import Policy, Rollout
from jraggym.sampling import Sampling

# from the scores of an episode's steps to its own
RULES: dict[str, Callable[[list[float]], float]] = {
    "last": lambda scores: scores[-1],
    "mean": lambda scores: float(np.mean(scores)),
    "least": min,
}


def episodes_best_of(
    shop: Workshop, actor: Decoder, critic: Critic, number: int, report: Callable[[int], None] | None = None
) -> list[dict[str, Any]]:
    """Samples so many episodes of each test question, one action at a time, and picks among N = 1, 2, 4 ... of them.

    Returns, for each N, {"n": N, rule: {"em", "interval"}}: the expected exact match of the episode that a rule puts
    first, exact over the draws of N episodes, with 95 % intervals over questions. The rules are RULES and "oracle",
    which knows the answers. Raises InputError for fewer than two episodes.
    """
    if number < 2:
        raise InputError("best of N needs episodes", got=number, remedy="Sample two or more.")
    settings, examples = shop.settings, shop.task.test.examples
    sampling = Sampling(1, settings.max_action, settings.test_temperature)
    rules = Rules(settings.max_turns, seed=settings.seed)
    rollout = Rollout(shop.config, shop.codec, shop.test_retriever, sampling, rules, batch=settings.episodes)
    copies = [example for example in examples for _ in range(number)]
    found = rollout.run(Policy(shop.config, actor, critic), copies, shop.key("whole episodes"), report=report)
    em = [outcome(t.final, e)["em"] for e, t in zip(copies, found, strict=True)]
    steps = [[float(step.candidates[step.chosen].score or 0.0) for step in t.steps] for t in found]
    values = np.array(em).reshape(-1, number)  # [questions, episodes]
    orders = {name: np.array([rule(scores) for scores in steps]).reshape(-1, number) for name, rule in RULES.items()}
    orders["oracle"] = values
    curve = []
    for n in sizes(number):
        picked = {
            name: np.array([best_of(by, line, n) for by, line in zip(order, values, strict=True)])
            for name, order in orders.items()
        }
        points = {
            name: {"em": float(each.mean()), "interval": list(bootstrap_interval(each, seed=settings.seed))}
            for name, each in picked.items()
        }
        curve.append({"n": n, **points})
    return curve
