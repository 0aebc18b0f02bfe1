"""Preference pairs among the candidates of one state."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from jraggym.batch import ProcessBatch

POSITIVE, NEGATIVE = 0.75, 0.5  # RAG-Gym: chosen if reward > 0.75, rejected if reward < 0.5


def positives(batch: ProcessBatch) -> Array:
    """Candidates [B, K] good enough to imitate."""
    return batch.candidate_mask & (batch.reward > POSITIVE)


def threshold_pairs(batch: ProcessBatch, below: float = NEGATIVE) -> Array:
    """bool [B, K, K]: i positive and j of reward < `below` (RAG-Gym's pos x neg product)."""
    negative = batch.candidate_mask & (batch.reward < below)
    return positives(batch)[:, :, None] & negative[:, None, :]


def ordered_pairs(batch: ProcessBatch) -> Array:
    """bool [B, K, K]: i has a higher reward than j; both are real."""
    real = batch.candidate_mask
    return real[:, :, None] & real[:, None, :] & (batch.reward[:, :, None] > batch.reward[:, None, :])


def masked_mean(values: Array, mask: Array) -> Array:
    """Mean over the True entries; 0 when there are none. Masked values may be anything, NaN included."""
    return jnp.sum(jnp.where(mask, values, 0.0)) / jnp.maximum(jnp.sum(mask), 1)


def state_mean(values: Array, mask: Array) -> Array:
    """Mean over states of each state's mean of [B, ...] where the mask holds: a state counts once."""
    rest = tuple(range(1, mask.ndim))
    count = jnp.sum(mask, axis=rest)
    mean = jnp.sum(jnp.where(mask, values, 0.0), axis=rest) / jnp.maximum(count, 1)
    return masked_mean(mean, count > 0)
