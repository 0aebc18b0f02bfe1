"""Supervised fine-tuning on good actions: -log pi(a+ | s)  (RAG-Gym 2.2.2), plain and reward-weighted."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from jraggym.batch import ProcessBatch
from jraggym.objectives.pairs import masked_mean, positives


def sft_loss(logprob: Array, batch: ProcessBatch, *, weighted: bool = False) -> tuple[Array, dict[str, Array]]:
    """Mean negative log-likelihood of the policy's own tokens in candidates with reward > 0.75.

    Args: logprob [B, K, A], in nats; weighted: take every candidate instead, each token weighted by its candidate's
      reward (reward-weighted regression, Peters & Schaal 2007): sum(r * nll) / sum(r). Rewards are at least 0.
    Returns: the loss and metrics.
    """
    if weighted:
        read = batch.own
        weight = jnp.where(read, batch.reward[:, :, None], 0.0)
        total = jnp.sum(weight)
        loss = -jnp.sum(weight * jnp.where(read, logprob, 0.0)) / jnp.where(total > 0, total, 1.0)
    else:
        loss = -masked_mean(logprob, batch.loss_mask & positives(batch)[:, :, None])
    return loss, {"loss": loss}
