"""Rewards of the answer: each metric under the name of the system that scores by it. No answer scores 0."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from jraggym import metrics
from jraggym.protocols.reading import final_answer
from jraggym.rewards.finished import Finished, Reward


def prediction(finished: Finished) -> str | None:
    """The answer in the model's last turn, however it came about; None where there is none."""
    return final_answer(finished.protocol, finished.turns[-1]) if finished.turns else None


def has_answer(finished: Finished) -> float:
    """1.0 where there is an answer, right or wrong."""
    return float(prediction(finished) is not None)


def answered(metric: Callable[[str | None, Sequence[str]], float]) -> Reward:
    """The metric of the answer, the best over the gold answers."""
    return lambda finished: metric(prediction(finished), finished.example.answers)


em = answered(metrics.exact_match)  # Search-R1, REX-RAG, ARENA
cover_em = answered(metrics.cover_exact_match)  # R1-Searcher's first stage
hotpot_f1 = answered(metrics.hotpot_f1)  # RAG-Gym, ReSearch
true_false_f1 = answered(metrics.true_false_f1)  # R1-Searcher, UR2
plain_f1 = answered(metrics.plain_f1)  # MMOA-RAG
set_f1 = answered(metrics.set_f1)  # DeepResearcher
