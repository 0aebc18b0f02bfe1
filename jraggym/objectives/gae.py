"""Generalised advantage estimation over the policy's own tokens (arXiv 1506.02438)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array


def gae(reward: Array, value: Array, mask: Array, *, gamma: float = 1.0, lam: float = 1.0) -> tuple[Array, Array]:
    """Advantages and returns of every policy token; what lies outside the mask is skipped as if it were not there.

        delta_t = r_t + gamma * V_next(t) - V_t,    A_t = delta_t + gamma * lam * A_next(t)

    where next(t) is the next token *in the mask*; after the last one, value and advantage are 0 (the episode ends).

    Args: reward, value, mask [..., A]; value_t is that of the state in which token t is chosen, and the reward of a
      step stands on its last policy token.
    Returns: advantages and returns (advantage + value), both [..., A] and 0 outside the mask.
    """
    reward, value = jnp.where(mask, reward, 0.0), jnp.where(mask, value, 0.0)

    def back(after: tuple[Array, Array], now: tuple[Array, ...]) -> tuple[tuple[Array, Array], Array]:
        (advantage, value_after), (r, v, own) = after, now
        found = r + gamma * value_after - v + gamma * lam * advantage
        return (jnp.where(own, found, advantage), jnp.where(own, v, value_after)), jnp.where(own, found, 0.0)

    zero = jnp.zeros(reward.shape[:-1])
    by_token = tuple(jnp.moveaxis(x, -1, 0) for x in (reward, value, mask))
    _, advantage = jax.lax.scan(back, (zero, zero), by_token, reverse=True)
    advantage = jnp.moveaxis(advantage, 0, -1)
    return advantage, advantage + value
