"""Advantages of a group: how much better each of K rewards is than its group's.

A group is the K candidates of one state with process rewards, or K whole episodes of one question with outcome
rewards and, where they are judged, a reward for each of their steps. A group of one has no rivals, and its advantage
is the reward itself (as in verl).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from jraggym.errors import InputError


def standardised(reward: Array, mask: Array, *, eps: float = 1e-6) -> Array:
    """(r - mean) / (std + eps) with the sample standard deviation (ddof 1)  (GRPO, arXiv 2402.03300).

    Args: reward [B, K]; mask bool [B, K]; eps: 1e-6 in verl, 1e-4 in TRL.
    Returns: [B, K], 0 where the mask is False.
    """
    centred = mean_only(reward, mask)
    count = jnp.sum(mask, axis=1, keepdims=True)
    variance = jnp.sum(jnp.where(mask, centred, 0.0) ** 2, axis=1, keepdims=True) / jnp.maximum(count - 1, 1)
    return jnp.where(count > 1, centred / (jnp.sqrt(variance) + eps), centred)


def mean_only(reward: Array, mask: Array) -> Array:
    """r - mean  (Dr. GRPO, arXiv 2503.20783): hard and easy groups weigh as their rewards differ."""
    reward = jnp.where(mask, reward, 0.0)
    count = jnp.sum(mask, axis=1, keepdims=True)
    mean = jnp.sum(reward, axis=1, keepdims=True) / jnp.maximum(count, 1)
    return jnp.where(mask, jnp.where(count > 1, reward - mean, reward), 0.0)


def leave_one_out(reward: Array, mask: Array) -> Array:
    """r - the mean of the others  (RLOO, arXiv 2402.14740); that is mean_only * n / (n - 1)."""
    count = jnp.sum(mask, axis=1, keepdims=True)
    return mean_only(reward, mask) * jnp.where(count > 1, count / jnp.maximum(count - 1, 1), 1)


# "global" is REINFORCE++-baseline (arXiv 2501.03262): `mean_only`, then `whiten` over the tokens of the whole batch
GROUP_ADVANTAGES = ("standardised", "mean_only", "leave_one_out", "global")


def group_advantages(kind: str, reward: Array, mask: Array, tokens: Array, *, eps: float = 1e-6) -> Array:
    """One of GROUP_ADVANTAGES, spread over the policy's own tokens.

    Args: reward [B, K]; mask bool [B, K]; tokens bool [B, K, A]: where the loss reads; eps: see `standardised`.
    Returns: [B, K, A], 0 elsewhere. Raises InputError for an unknown kind.
    """
    _known(kind)
    tokens = tokens & mask[:, :, None]
    if kind == "standardised":
        advantage = standardised(reward, mask, eps=eps)
    else:
        advantage = leave_one_out(reward, mask) if kind == "leave_one_out" else mean_only(reward, mask)
    spread = jnp.where(tokens, advantage[:, :, None], 0.0)
    return whiten(spread, tokens) if kind == "global" else spread


def step_advantages(
    kind: str, reward: Array, mask: Array, tokens: Array, *, gamma: float = 1.0, eps: float = 1e-6
) -> Array:
    """What the steps of whole episodes add: each token has the advantage of its step, which is the discounted return
    from there beside the returns of the group's other episodes from the same step on (GTPO, arXiv 2511.14846).

    The group of a step are the episodes that have one with its number, so a step is never blamed for coming late: where
    instead each reward is first set against all rewards of the group, and then summed (arXiv 2402.03300, 4.1.3), two
    useless searches weigh more than one premature answer, and agents learn to answer early.

    Args: reward [B, K, A]: on each step's last own token; mask, tokens, eps: as for `group_advantages`; gamma: discount
      from a step to the one before it; 0 leaves each step its own reward.
    Returns: [B, K, A], 0 outside the tokens and where no other episode is so long. Raises InputError for an unknown
      kind.

    Two episodes with rewards 1, 0, and 0, "mean_only": the returns 1 and 0 of the first steps become 1/2 and -1/2; the
    second step of the first episode has no rival, and 0.
    """
    _known(kind)
    b, k, a = reward.shape
    tokens = tokens & mask[:, :, None]
    following = jnp.pad(tokens[:, :, 1:], ((0, 0), (0, 0), (0, 1)))
    ends = tokens & (~following | (reward != 0))
    returns = _returns(jnp.where(ends, reward, 0.0), ends, gamma)
    step = jnp.minimum(jnp.cumsum(ends, axis=2) - ends, a - 1)  # of each token, from 0; at most one for each token
    place = jnp.arange(b)[:, None, None], jnp.arange(k)[None, :, None], step

    def by_step(values: Array) -> Array:
        """What stands on the steps' ends, by the step's number: [B, K, A] to [B * A, K]."""
        table = jnp.zeros((b, k, a)).at[place].add(jnp.where(ends, values, 0.0))
        return table.swapaxes(1, 2).reshape(b * a, k)

    value, present = by_step(returns), by_step(jnp.ones((b, k, a))) > 0
    rivals = present & (jnp.sum(present, axis=1, keepdims=True) > 1)
    if kind == "standardised":
        advantage = standardised(value, rivals, eps=eps)
    else:
        advantage = leave_one_out(value, rivals) if kind == "leave_one_out" else mean_only(value, rivals)
    spread = advantage.reshape(b, a, k).swapaxes(1, 2)[place]
    spread = jnp.where(tokens, spread, 0.0)
    return whiten(spread, tokens) if kind == "global" else spread


def _returns(reward: Array, ends: Array, gamma: float) -> Array:
    """From each token on, the sum of what stands on steps' ends [B, K, A], discounted by the ends in between."""

    def back(after: Array, at: tuple[Array, Array]) -> tuple[Array, Array]:
        value, end = at
        now = value + jnp.where(end, gamma, 1.0) * after
        return now, now

    columns = jnp.moveaxis(reward, -1, 0), jnp.moveaxis(ends, -1, 0)
    return jnp.moveaxis(jax.lax.scan(back, jnp.zeros(ends.shape[:2]), columns, reverse=True)[1], 0, -1)


def _known(kind: str) -> None:
    if kind not in GROUP_ADVANTAGES:
        raise InputError("unknown advantage", got=kind, remedy=f"Use one of {', '.join(GROUP_ADVANTAGES)}.")


def whiten(values: Array, mask: Array) -> Array:
    """(v - mean) / std over the entries in the mask, 0 elsewhere; the population's variance, at least 1e-8."""
    count = jnp.maximum(jnp.sum(mask), 1)
    mean = jnp.sum(jnp.where(mask, values, 0.0)) / count
    centred = jnp.where(mask, values - mean, 0.0)
    return centred * jax.lax.rsqrt(jnp.maximum(jnp.sum(centred**2) / count, 1e-8))
