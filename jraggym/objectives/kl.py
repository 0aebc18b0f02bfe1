"""Estimates of KL(policy || reference) from the sampled tokens, and how strongly it is held down.

On the policy's own samples, the expected gradient of k2 as a loss is that of KL(pi || ref), of k3 as a loss that of
KL(ref || pi), and of k1 as a loss 0. So k1 belongs into the reward.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array

from jraggym.errors import InputError

ESTIMATORS = ("k1", "k2", "k3")


def kl_estimate(kind: str, logprob: Array, reference: Array) -> Array:
    """An estimate for each token, in nats (Schulman, "Approximating KL divergence", 2020).

    With d = logprob - reference: k1 = d (unbiased, of either sign), k2 = d^2 / 2, k3 = e^-d - 1 + d (unbiased, >= 0).
    Args: logprob, reference of the same shape. Raises InputError for an unknown kind.
    """
    d = logprob - reference
    if kind == "k1":
        return d
    if kind == "k2":
        return 0.5 * d**2
    if kind == "k3":
        return jnp.expm1(-d) + d
    raise InputError("unknown KL estimate", got=kind, remedy=f"Use one of {', '.join(ESTIMATORS)}.")


@dataclass(frozen=True, slots=True)
class AdaptiveKL:
    """A weight that follows the KL towards a target, and never falls under a floor (arXiv 1909.08593, section 2.2).

    error = clip(KL / target - 1, -0.2, 0.2);  weight <- max(floor, weight * (1 + error * sequences / horizon))
    """

    target: float = 0.0  # nats for each sequence; 0: the weight stays as it is
    horizon: float = 10_000.0  # sequences
    floor: float = 0.0

    def __post_init__(self) -> None:
        if self.target < 0 or self.horizon <= 0 or self.floor < 0:
            raise InputError("adaptive KL: target >= 0, horizon > 0, floor >= 0", got=self, remedy="Change them.")

    def update(self, weight: float, kl: float, sequences: int) -> float:
        """The weight after a batch of `sequences` with mean `kl`."""
        if not self.target:
            return weight
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        return max(self.floor, weight * (1 + error * sequences / self.horizon))
