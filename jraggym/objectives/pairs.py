"""Preference pairs among the candidates of one state."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from jraggym.batch import ProcessBatch

POSITIVE, NEGATIVE = 0.75, 0.5  # RAG-Gym: chosen if reward > 0.75, rejected if reward < 0.5


def positives(batch: ProcessBatch) -> Array:
    """Candidates [B, K] good enough to imitate."""
    return batch.candidate_mask & (batch.reward > POSITIVE)


def negatives(batch: ProcessBatch) -> Array:
    """Candidates [B, K] bad enough to avoid."""
    return batch.candidate_mask & (batch.reward < NEGATIVE)


def threshold_pairs(batch: ProcessBatch) -> Array:
    """bool [B, K, K]: i positive and j negative (RAG-Gym's pos x neg product)."""
    return positives(batch)[:, :, None] & negatives(batch)[:, None, :]


def ordered_pairs(batch: ProcessBatch) -> Array:
    """bool [B, K, K]: i has a strictly higher reward than j; keeps what the ranking says of the middle."""
    real = batch.candidate_mask[:, :, None] & batch.candidate_mask[:, None, :]
    return real & (batch.reward[:, :, None] > batch.reward[:, None, :])


def masked_mean(values: Array, mask: Array) -> Array:
    """Mean over the True entries; 0 when there are none. Masked values may be anything, NaN included."""
    return jnp.sum(jnp.where(mask, values, 0.0)) / jnp.maximum(jnp.sum(mask), 1)
