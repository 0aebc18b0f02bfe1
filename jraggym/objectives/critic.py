"""The critic's objective: pairwise Bradley-Terry over the candidates of a state (RAG-Gym equation 1)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from jraggym.batch import ProcessBatch
from jraggym.objectives.pairs import NEGATIVE, masked_mean, positives, state_mean, threshold_pairs


def critic_loss(
    score: Array, batch: ProcessBatch, *, below: float = NEGATIVE, centre: float = 0.01, pointwise: float = 0.0
) -> tuple[Array, dict[str, Array]]:
    """-log sigmoid(r+ - r-) + centre * (r+ + r-)^2 over pairs of good and worse candidates; states count alike.

    Args: score [B, K]; below: the worse one's reward is smaller than this; centre: weight of the centring term that
      the reference code adds; pointwise: weight of -log sigmoid(+-r), which asks of each candidate whether it is good.
    Returns: the loss and metrics; accuracy is the share of pairs ranked rightly.
    """
    pairs = threshold_pairs(batch, below)
    score = jnp.where(batch.candidate_mask, score, 0.0)  # 0 * NaN would reach the gradient of the others
    difference = score[:, :, None] - score[:, None, :]
    total = score[:, :, None] + score[:, None, :]
    loss = state_mean(-jax.nn.log_sigmoid(difference) + centre * total**2, pairs)
    signed = jnp.where(positives(batch), score, -score)
    loss = loss + pointwise * masked_mean(-jax.nn.log_sigmoid(signed), batch.candidate_mask)
    accuracy = masked_mean((difference > 0).astype(jnp.float32), pairs)
    return loss, {"loss": loss, "accuracy": accuracy, "pairs": jnp.sum(pairs).astype(jnp.float32)}
