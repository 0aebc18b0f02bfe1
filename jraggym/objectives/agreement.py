"""How well a critic's scores agree with the process rewards: by pairs, by rank distance, and by confidence."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from jraggym.batch import ProcessBatch
from jraggym.objectives.pairs import ordered_pairs

BINS = 10  # of confidence, from 1/2 to 1


@struct.dataclass
class Agreement:
    """Counts over pairs of candidates of one state with different rewards; those of several batches add up.

    The rank distance of a pair is the difference of its candidates' ranks, where a rank counts the strictly better
    candidates of the state: 1 .. K - 1.
    """

    pairs: Any  # f32 [K]     by rank distance
    right: Any  # f32 [K]     pairs whose better candidate has the higher score (equal scores count one half)
    binned: Any  # f32 [BINS]  pairs by confidence, sigmoid(|difference of the scores|)
    binned_right: Any  # f32 [BINS]
    confidence: Any  # f32 [BINS]  sum of the confidences

    def __add__(self, other: Agreement) -> Agreement:
        return jax.tree.map(lambda a, b: a + b, self, other)

    def summary(self) -> dict[str, Any]:
        """`accuracy` over all pairs, `by_distance` {distance: accuracy}, and the expected `calibration_error`.

        The error is sum over bins of |share right - mean confidence| * share of pairs (arXiv 1706.04599, equation 3).
        Raises ValueError when no pair was counted.
        """
        pairs, right = np.asarray(self.pairs), np.asarray(self.right)
        total = float(pairs.sum())
        if not total:
            raise ValueError("no pair of candidates with different rewards was counted")
        error = np.abs(np.asarray(self.binned_right) - np.asarray(self.confidence)).sum() / total
        return {
            "pairs": int(total),
            "accuracy": float(right.sum()) / total,
            "by_distance": {d: float(right[d] / pairs[d]) for d in range(len(pairs)) if pairs[d]},
            "calibration_error": float(error),
        }

    def reliability(self) -> list[dict[str, float]]:
        """The table behind `calibration_error`: for each bin with pairs, its pairs, mean confidence and share right."""
        binned, right, confidence = map(np.asarray, (self.binned, self.binned_right, self.confidence))
        return [
            {
                **{"from": 0.5 + i / (2 * BINS), "to": 0.5 + (i + 1) / (2 * BINS), "pairs": int(binned[i])},
                **{"confidence": float(confidence[i] / binned[i]), "right": float(right[i] / binned[i])},
            }
            for i in range(BINS)
            if binned[i]
        ]


def agreement(score: Array, batch: ProcessBatch) -> Agreement:
    """Counts the pairs of a batch; score [B, K]."""
    score = jnp.where(batch.candidate_mask, score, 0.0)
    better = ordered_pairs(batch)
    rank = jnp.sum(better, axis=1)  # [B, K]: how many are better
    distance = jnp.where(better, rank[:, None, :] - rank[:, :, None], 0)
    difference = score[:, :, None] - score[:, None, :]
    count = better.astype(jnp.float32)
    right = count * jnp.where(difference == 0, 0.5, difference > 0)
    confidence = jax.nn.sigmoid(jnp.abs(difference))
    place = jnp.minimum(((confidence - 0.5) * 2 * BINS).astype(jnp.int32), BINS - 1)

    def total(values: Array, index: Array, length: int) -> Array:
        return jnp.zeros(length).at[index.reshape(-1)].add(values.reshape(-1))

    k = score.shape[1]
    return Agreement(
        total(count, distance, k),
        total(right, distance, k),
        total(count, place, BINS),
        total(right, place, BINS),
        total(count * confidence, place, BINS),
    )
