"""The clipped policy-gradient loss that GRPO and PPO share; what differs is where the advantages come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from jraggym.batch import ProcessBatch
from jraggym.errors import InputError
from jraggym.objectives.kl import ESTIMATORS, kl_estimate
from jraggym.objectives.pairs import masked_mean

AGGREGATES = ("token", "sequence", "fixed")


@struct.dataclass
class Experience:
    """Sampled candidates with all that stays fixed while a policy is optimised on them; every field [B, K, A]."""

    batch: ProcessBatch
    advantage: Any
    old_logprob: Any  # under the weights before the first update, by the trainer's own forward
    reference_logprob: Any = None  # under the frozen reference, where the loss has a KL term
    value: Any = None  # PPO: of the value function before the first update
    returns: Any = None  # PPO


@dataclass(frozen=True, slots=True)
class PolicyLoss:
    """The variants of the loss; the defaults are GRPO's as in verl (arXiv 2402.03300)."""

    clip_low: float = 0.2  # the ratio stays above 1 - clip_low
    clip_high: float = 0.2  # and below 1 + clip_high; larger than clip_low in DAPO (arXiv 2503.14476)
    dual_clip: float = 0.0  # where A < 0, the loss is at most dual_clip * |A| (arXiv 1912.09729); 0: off, else > 1
    aggregate: str = (
        "token"  # mean over tokens, "sequence": mean of sequence means, "fixed": sum over length * sequences
    )
    length: int = 0  # of "fixed" (Dr. GRPO, arXiv 2503.20783); 0: A
    kl: str = "k3"
    kl_weight: float = 0.0  # of the KL as a loss
    entropy_weight: float = 0.0
    truncate: float = 0.0  # cap of the importance weight old / behaviour of an external sampler; 0: off

    def __post_init__(self) -> None:
        if self.aggregate not in AGGREGATES or self.kl not in ESTIMATORS:
            got = f"aggregate={self.aggregate!r}, kl={self.kl!r}"
            raise InputError("unknown variant", got=got, remedy=f"Use one of {AGGREGATES} and of {ESTIMATORS}.")
        if not 0 <= self.clip_low <= 1 or self.clip_high < 0 or (self.dual_clip and self.dual_clip <= 1):
            raise InputError("0 <= clip_low <= 1, clip_high >= 0, dual_clip > 1", got=self, remedy="Change them.")


def policy_loss(
    logprob: Array, experience: Experience, how: PolicyLoss, entropy: Array | None = None
) -> tuple[Array, dict[str, Array]]:
    """max(-A * ratio, -A * clip(ratio)) with ratio = exp(logprob - old), plus KL and entropy terms (arXiv 1707.06347).

    Args: logprob [B, K, A] of the present weights, in nats; entropy [B, K, A], where `entropy_weight` is not 0.
    Returns: the loss and metrics over the policy's own tokens: the share of clipped ones, the mean KL to the old
      weights (k3) and, with a reference, to it.
    """
    batch = experience.batch
    read = batch.own
    safe = [jnp.where(read, x, 0.0) for x in (logprob, experience.old_logprob, experience.advantage)]
    logprob, old, advantage = safe  # 0 * NaN would reach the gradient of the others
    ratio = jnp.exp(logprob - old)
    plain = -advantage * ratio
    clipped = -advantage * jnp.clip(ratio, 1 - how.clip_low, 1 + how.clip_high)
    losses = jnp.maximum(plain, clipped)
    if how.dual_clip:
        losses = jnp.where(advantage < 0, jnp.minimum(losses, -how.dual_clip * advantage), losses)
    if how.truncate:
        behaviour = jnp.where(read, batch.behaviour_logprob, 0.0)
        losses = losses * jnp.minimum(jnp.exp(old - behaviour), how.truncate)
    metrics = {"clipped": masked_mean((clipped > plain).astype(jnp.float32), read)}
    metrics["kl_old"] = masked_mean(kl_estimate("k3", logprob, old), read)
    if experience.reference_logprob is not None:
        reference = jnp.where(read, experience.reference_logprob, 0.0)
        kl = kl_estimate(how.kl, logprob, reference)
        metrics["kl_reference"] = masked_mean(kl_estimate("k3", logprob, reference), read)
        losses = losses + how.kl_weight * kl
    elif how.kl_weight:
        raise InputError("a KL term needs a reference", got="reference_logprob None", remedy="Give it, or kl_weight=0.")
    if entropy is not None:
        metrics["entropy"] = masked_mean(entropy, read)
        losses = losses - how.entropy_weight * entropy
    loss = aggregate(losses, read, how)
    return loss, {"loss": loss, **jax.lax.stop_gradient(metrics)}


def aggregate(losses: Array, mask: Array, how: PolicyLoss) -> Array:
    """One number from token losses [B, K, A]; a sequence is a candidate with at least one token in the mask."""
    losses = jnp.where(mask, losses, 0.0)
    if how.aggregate == "token":
        return masked_mean(losses, mask)
    tokens = jnp.sum(mask, axis=-1)
    if how.aggregate == "sequence":
        return masked_mean(jnp.sum(losses, axis=-1) / jnp.maximum(tokens, 1), tokens > 0)
    return jnp.sum(losses) / ((how.length or mask.shape[-1]) * jnp.maximum(jnp.sum(tokens > 0), 1))
