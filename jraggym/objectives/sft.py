"""Supervised fine-tuning on good actions: -log pi(a+ | s)  (RAG-Gym 2.2.2)."""

from __future__ import annotations

from jax import Array

from jraggym.batch import ProcessBatch
from jraggym.objectives.pairs import masked_mean, positives


def sft_loss(logprob: Array, batch: ProcessBatch) -> tuple[Array, dict[str, Array]]:
    """Mean negative log-likelihood of the policy's own tokens in candidates with reward > 0.75.

    Args: logprob [B, K, A], in nats. Returns: the loss and metrics.
    """
    loss = -masked_mean(logprob, batch.loss_mask & positives(batch)[:, :, None])
    return loss, {"loss": loss}
