"""Direct preference optimisation over all positive x negative candidates of a state (arXiv 2305.18290)."""

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
    nll: float = 0.0,
    below: float = NEGATIVE,
) -> tuple[Array, dict[str, Array]]:
    """-log sigmoid(beta * ((log pi+ - log ref+) - (log pi- - log ref-))), the mean over all pairs of the batch.

    Args: logprob, reference [B, K, A]: token log-probabilities of policy and reference, in nats; beta: strength
      of the tie to the reference; nll: weight of an added SFT term on the positives (arXiv 2404.19733); below: the
      reward of a rejected candidate is smaller than this.
    Returns: the loss and metrics.
    """
    read = batch.loss_mask & batch.candidate_mask[:, :, None]  # 0 * NaN would reach the gradient of the others
    gain = jnp.sum(jnp.where(read, logprob - reference, 0.0), axis=-1)  # [B, K]
    margin = beta * (gain[:, :, None] - gain[:, None, :])
    pairs = threshold_pairs(batch, below)
    preference = masked_mean(-jax.nn.log_sigmoid(margin), pairs)
    imitation, _ = sft_loss(logprob, batch)
    loss = preference + nll * imitation
    accuracy = masked_mean((margin > 0).astype(jnp.float32), pairs)
    return loss, {
        "loss": loss,
        "preference": preference,
        "accuracy": accuracy,
        "margin": masked_mean(margin, pairs),
        "pairs": jnp.sum(pairs).astype(jnp.float32),
    }
