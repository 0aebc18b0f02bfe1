"""Preference optimisation over all positive x negative candidates of a state: DPO, conservative DPO and IPO."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from jraggym.batch import ProcessBatch
from jraggym.objectives.pairs import NEGATIVE, masked_mean, threshold_pairs
from jraggym.objectives.sft import sft_loss


def dpo_loss(
    logprob: Array,
    reference: Array,
    batch: ProcessBatch,
    *,
    beta: float = 0.1,
    ipo: bool = False,
    smoothing: float = 0.0,
    per_token: bool = False,
    nll: float = 0.0,
    below: float = NEGATIVE,
) -> tuple[Array, dict[str, Array]]:
    """-log sigmoid(beta * h), h = (log pi+ - log ref+) - (log pi- - log ref-), the mean over all pairs of the batch.

    Args:
      logprob, reference: token log-probabilities [B, K, A] of policy and reference, in nats.
      beta: strength of the tie to the reference (arXiv 2305.18290).
      ipo: the loss (h - 1 / (2 beta))^2 instead (arXiv 2310.12036, equation 17); TRL's "ipo" is this with `per_token`.
      smoothing: the probability that a pair's label is wrong (conservative DPO, Mitchell 2023); not for IPO.
      per_token: log-probabilities are means over an action's tokens instead of sums, so that length does not count.
      nll: weight of an added SFT term on the positives (arXiv 2404.19733).
      below: the reward of a rejected candidate is smaller than this.
    Returns: the loss and metrics; `margin` is the mean of beta * h, `accuracy` the share of pairs with h > 0.
    """
    read = batch.own  # 0 * NaN would reach the gradient of the others
    gain = jnp.sum(jnp.where(read, logprob - reference, 0.0), axis=-1)  # [B, K]
    if per_token:
        gain = gain / jnp.maximum(jnp.sum(read, axis=-1), 1)
    h = gain[:, :, None] - gain[:, None, :]  # [B, K, K]
    pairs = threshold_pairs(batch, below)
    if ipo:
        losses = (h - 1 / (2 * beta)) ** 2
    else:
        losses = -(1 - smoothing) * jax.nn.log_sigmoid(beta * h) - smoothing * jax.nn.log_sigmoid(-beta * h)
    preference = masked_mean(losses, pairs)
    imitation, _ = sft_loss(logprob, batch)
    loss = preference + nll * imitation
    return loss, {
        "loss": loss,
        "preference": preference,
        "accuracy": masked_mean((h > 0).astype(jnp.float32), pairs),
        "margin": masked_mean(beta * h, pairs),
        "pairs": jnp.sum(pairs).astype(jnp.float32),
    }
