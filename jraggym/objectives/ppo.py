"""PPO's own parts: rewards for each token, the experience they make, and the value function's loss."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from jraggym.batch import ProcessBatch
from jraggym.objectives.advantages import whiten
from jraggym.objectives.gae import gae
from jraggym.objectives.kl import kl_estimate
from jraggym.objectives.pairs import masked_mean
from jraggym.objectives.policy import Experience


def token_rewards(batch: ProcessBatch, logprob: Array, reference: Array | None, *, kl: str, weight: Array) -> Array:
    """The rewards [B, K, A] of the policy's own tokens: those of the batch, minus weight * KL to the reference.

    `batch.reward` stands on each candidate's last own token; rewards of single steps inside an episode
    (`batch.token_reward`) come on top. Always floats.

    Args: logprob, reference [B, K, A]; kl: the estimate (see `kl_estimate`); weight: of the KL to the reference.
    """
    own = batch.own
    reward = jnp.where(last_own(own), batch.reward[:, :, None], 0.0)
    if batch.token_reward is not None:
        reward = reward + jnp.where(own, batch.token_reward, 0.0)
    if reference is None:
        return reward
    return reward - weight * kl_estimate(kl, jnp.where(own, logprob, 0.0), jnp.where(own, reference, 0.0))


def last_own(own: Array) -> Array:
    """bool [..., A]: the last True of each row."""
    after = jnp.cumsum(own[..., ::-1], axis=-1)[..., ::-1]
    return own & (after == 1)


def ppo_experience(
    batch: ProcessBatch,
    reward: Array,
    value: Array,
    logprob: Array,
    reference: Array | None,
    gamma: float,
    lam: float,
    leaky: bool = False,
) -> Experience:
    """Whitened GAE advantages and returns from token rewards and values [B, K, A] (arXiv 1707.06347).

    With `leaky`, inserted tokens are steps and are whitened too, as in Search-R1's published code; no policy loss
    reads their advantages.
    """
    read = batch.response if leaky else batch.own
    advantage, returns = gae(reward, value, read, gamma=gamma, lam=lam)
    return Experience(batch, whiten(advantage, read), logprob, reference, value, returns)


def value_loss(
    value: Array, experience: Experience, *, clip: float = 0.2, leaky: bool = False
) -> tuple[Array, dict[str, Array]]:
    """1/2 max((V - R)^2, (clip(V, old - clip, old + clip) - R)^2), the mean over the policy's own tokens.

    Args: value [B, K, A] of the present weights; clip: how far a value may move from the old one, 0 for no limit;
      leaky: read inserted tokens too, as in Search-R1's published code.
    Returns: the loss and metrics; `explained` is 1 - Var(R - V) / Var(R).
    """
    read = experience.batch.response if leaky else experience.batch.own
    value, old, returns = (jnp.where(read, x, 0.0) for x in (value, experience.value, experience.returns))
    losses = (value - returns) ** 2
    if clip:
        losses = jnp.maximum(losses, (jnp.clip(value, old - clip, old + clip) - returns) ** 2)
    loss = 0.5 * masked_mean(losses, read)
    error, mean = returns - value, masked_mean(returns, read)
    spread = masked_mean((returns - mean) ** 2, read)
    residual = masked_mean((error - masked_mean(error, read)) ** 2, read)
    return loss, {"loss": loss, "explained": 1 - residual / jnp.maximum(spread, 1e-8)}
