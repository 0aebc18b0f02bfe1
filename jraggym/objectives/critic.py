"""The critic's objective: pairwise Bradley-Terry over the candidates of a state (RAG-Gym equation 1)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from jraggym.batch import ProcessBatch
from jraggym.objectives.pairs import masked_mean, ordered_pairs


def critic_loss(score: Array, batch: ProcessBatch, *, centre: float = 0.01) -> tuple[Array, dict[str, Array]]:
    """-log sigmoid(r+ - r-) over all pairs of different reward, plus centre * (r+ + r-)^2.

    Args: score [B, K]; centre: weight of the centring term that the reference code adds (0 leaves it out).
    Returns: the loss and metrics; accuracy is the share of pairs ranked rightly.
    """
    pairs = ordered_pairs(batch)
    score = jnp.where(batch.candidate_mask, score, 0.0)  # 0 * NaN would reach the gradient of the others
    difference = score[:, :, None] - score[:, None, :]
    total = score[:, :, None] + score[:, None, :]
    loss = masked_mean(-jax.nn.log_sigmoid(difference) + centre * total**2, pairs)
    accuracy = masked_mean((difference > 0).astype(jnp.float32), pairs)
    return loss, {"loss": loss, "accuracy": accuracy, "pairs": jnp.sum(pairs).astype(jnp.float32)}
