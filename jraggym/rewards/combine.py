"""How terms become one reward: functions from rewards to a reward."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

from jraggym.errors import InputError
from jraggym.rewards.finished import Finished, Reward


def gate(condition: Reward, then: Reward | float, otherwise: Reward | float = 0.0) -> Reward:
    """`then` where the condition is not 0, `otherwise` where it is."""

    def reward(finished: Finished) -> float:
        chosen = then if condition(finished) else otherwise
        return chosen(finished) if callable(chosen) else chosen

    return reward


def or_else(first: Reward, otherwise: float) -> Reward:
    """`first`, or `otherwise` where it is 0."""
    return lambda finished: first(finished) or otherwise


def total(*terms: Reward) -> Reward:
    """The sum of the terms."""
    return lambda finished: sum(term(finished) for term in terms)


def scaled(term: Reward, weight: float, shift: float = 0.0) -> Reward:
    """weight * term + shift."""
    return lambda finished: weight * term(finished) + shift


def all_of(*terms: Reward) -> Reward:
    """1.0 where every term is 1, else 0.0: a conjunction, to gate by or to scale to a bonus."""
    return lambda finished: float(all(term(finished) == 1 for term in terms))


def failed(*terms: Reward) -> Reward:
    """How many of the terms are not 1: the number of violations."""
    return lambda finished: float(sum(term(finished) != 1 for term in terms))


def by_mode(searching: Reward, closed: Reward) -> Reward:
    """One reward for samples that may search and another for those that may not."""
    return lambda finished: (searching if finished.may_search else closed)(finished)


def staged(*stages: tuple[int, Reward]) -> Callable[[int], Reward]:
    """The reward of each training step, from stages (first step, reward) in order; `staged(...)(step)`.

    Raises InputError when the stages do not begin at step 0 and ascend.
    """
    starts = [start for start, _ in stages]
    if not starts or starts[0] != 0 or any(a >= b for a, b in pairwise(starts)):
        raise InputError("stages begin at step 0 and ascend", got=starts, remedy="Give (0, reward), (100, reward) ...")
    return lambda step: [reward for start, reward in stages if start <= max(step, 0)][-1]
