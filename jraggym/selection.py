"""Which of the K candidates is executed: each rule is a function of the candidates and a random generator."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence

from jraggym.types import Candidate

Selector = Callable[[Sequence[Candidate], random.Random], int]


def first(candidates: Sequence[Candidate], rng: random.Random) -> int:
    """The first sample: the plain actor (greedy at temperature 0)."""
    return 0


def at_random(candidates: Sequence[Candidate], rng: random.Random) -> int:
    """The random-critic control: a random score for each candidate."""
    return rng.randrange(len(candidates))


def by_score(candidates: Sequence[Candidate], rng: random.Random) -> int:
    """Best of N: the highest critic score (RAG-Gym algorithm 1); ties go to the first."""
    return max(range(len(candidates)), key=lambda i: (_number(candidates[i].score), -i))


def by_majority(candidates: Sequence[Candidate], rng: random.Random) -> int:
    """The most frequent action text (self-consistency, arXiv 2203.11171, per step); ties go to the likelier."""
    count = Counter(candidate.text for candidate in candidates)
    return max(range(len(candidates)), key=lambda i: (count[candidates[i].text], _number(candidates[i].logprob), -i))


def by_reward(candidates: Sequence[Candidate], rng: random.Random) -> int:
    """The judge's best; ties are broken at random, never by position. Unlabelled ones come last."""
    best = max(_number(candidate.reward) for candidate in candidates)
    return rng.choice([i for i, candidate in enumerate(candidates) if _number(candidate.reward) == best])


SELECTORS: dict[str, Selector] = {
    "first": first,
    "random": at_random,
    "score": by_score,
    "majority": by_majority,
    "reward": by_reward,
}


def _number(value: float | None) -> float:
    return float("-inf") if value is None else value
