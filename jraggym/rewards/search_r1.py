"""Search-R1's rewards (arXiv 2503.09516): exact match, and its later version that also rewards form and evidence."""

from __future__ import annotations

from jraggym.rewards.answer import em, has_answer
from jraggym.rewards.combine import gate, scaled
from jraggym.rewards.evidence import gold_in_observations
from jraggym.rewards.finished import Reward
from jraggym.rewards.form import valid_sequence

search_r1_em = em


def search_r1_format(lambda_s: float = 0.2, lambda_f: float = 0.1, lambda_r: float = 0.0) -> Reward:
    """Version 0.3 of the published code.

                    valid sequence                              invalid
    answer right    1                                           1 - lambda_s
    answer wrong    lambda_s, + lambda_r with gold evidence     lambda_f, 0 without an answer
    """
    wrong = scaled(gold_in_observations, lambda_r, lambda_s)
    return gate(valid_sequence, gate(em, 1.0, wrong), gate(em, 1 - lambda_s, gate(has_answer, lambda_f)))
