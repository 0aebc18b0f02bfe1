"""The critic's objectives over the candidates of a state: pairs (Bradley-Terry), whole rankings, single candidates."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from jraggym.batch import ProcessBatch
from jraggym.objectives.pairs import NEGATIVE, masked_mean, ordered_pairs, positives, state_mean, threshold_pairs


def critic_loss(
    score: Array,
    batch: ProcessBatch,
    *,
    pairwise: float = 1.0,
    listwise: float = 0.0,
    pointwise: float = 0.0,
    below: float = NEGATIVE,
    centre: float = 0.01,
    soft: bool = False,
) -> tuple[Array, dict[str, Array]]:
    """The weighted sum of the three losses below.

    Args: score [B, K]; pairwise, listwise, pointwise: weights; below, centre: see `bradley_terry_loss`; soft: the
      pointwise targets are the rewards themselves instead of whether they are above 0.75.
    Returns: the loss and metrics; accuracy is the share of pairs ranked rightly.
    """
    score = jnp.where(batch.candidate_mask, score, 0.0)  # 0 * NaN would reach the gradient of the others
    pairs = threshold_pairs(batch, below)
    loss = pairwise * bradley_terry_loss(score, pairs, centre=centre)
    if listwise:
        loss = loss + listwise * plackett_luce_loss(score, batch)
    if pointwise:
        target = batch.reward if soft else positives(batch).astype(jnp.float32)
        loss = loss + pointwise * pointwise_loss(score, target, batch.candidate_mask)
    accuracy = masked_mean((score[:, :, None] > score[:, None, :]).astype(jnp.float32), pairs)
    return loss, {"loss": loss, "accuracy": accuracy, "pairs": jnp.sum(pairs).astype(jnp.float32)}


def bradley_terry_loss(score: Array, pairs: Array, *, centre: float = 0.0) -> Array:
    """-log sigmoid(r+ - r-) + centre * (r+ + r-)^2 (RAG-Gym equation 1); states count alike.

    Args: score [B, K]; pairs bool [B, K, K]: (better, worse); centre: weight of the centring term (arXiv 2312.09244),
      0.01 in the reference code. Without it, adding a constant to a state's scores changes nothing.
    """
    difference = score[:, :, None] - score[:, None, :]
    total = score[:, :, None] + score[:, None, :]
    return state_mean(-jax.nn.log_sigmoid(difference) + centre * total**2, pairs)


def plackett_luce_loss(score: Array, batch: ProcessBatch) -> Array:
    """The negative log-likelihood of the whole ranking: each candidate is chosen first among itself and all worse ones.

        mean over i of  -log( e^s_i / (e^s_i + sum over j with reward_j < reward_i of e^s_j) )

    Without ties that is the Plackett-Luce model (Plackett 1975) over the number of its factors; tied candidates do not
    compete, and the worst ones choose among themselves alone and do not count. States count alike.
    """
    worse = ordered_pairs(batch)  # [B, i, j]: j is worse than i
    field = worse | jnp.eye(score.shape[1], dtype=bool)
    rivals = jnp.where(field, score[:, None, :], -jnp.inf)
    losses = jax.nn.logsumexp(rivals, axis=-1) - score
    return state_mean(losses, jnp.any(worse, axis=-1))


def pointwise_loss(score: Array, target: Array, mask: Array) -> Array:
    """Binary cross-entropy of sigmoid(score) [B, K] against targets [B, K] in [0, 1], the mean over candidates."""
    losses = -target * jax.nn.log_sigmoid(score) - (1 - target) * jax.nn.log_sigmoid(-score)
    return masked_mean(losses, mask)
