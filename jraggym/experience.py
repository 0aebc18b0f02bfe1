"""From freshly sampled candidates to what a policy is optimised on: GRPO's and PPO's experience, in one jitted call.

Everything here is computed once for an iteration, under the weights that sampled, and stays fixed over its epochs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jraggym.batch import ProcessBatch
from jraggym.errors import InputError
from jraggym.objectives.advantages import GROUP_ADVANTAGES, group_advantages, step_advantages
from jraggym.objectives.kl import AdaptiveKL, kl_estimate
from jraggym.objectives.pairs import masked_mean
from jraggym.objectives.policy import Experience, PolicyLoss
from jraggym.objectives.ppo import ppo_experience, token_rewards
from jraggym.steps import Network

Maker = Callable[..., tuple[Experience, dict[str, Array]]]


@dataclass(frozen=True)
class GRPO:
    """Group advantages (arXiv 2402.03300): K candidates of a state, or K whole episodes of a question.

    Where the steps of episodes have rewards, a token's advantage is that of the outcome and that of the return from its
    step on; see `step_advantages`.
    """

    advantage: str = "standardised"  # one of GROUP_ADVANTAGES
    eps: float = 1e-6  # of "standardised": 1e-6 in verl, 1e-4 in TRL
    gamma: float = 1.0  # discount from a judged step to the one before it
    reward_kl: str = "k1"
    reward_kl_weight: float = 0.0  # of the KL to the reference in a candidate's reward
    loss: PolicyLoss = field(default_factory=PolicyLoss)

    def __post_init__(self) -> None:
        if self.advantage not in GROUP_ADVANTAGES:
            remedy = f"Use one of {', '.join(GROUP_ADVANTAGES)}."
            raise InputError("unknown advantage", got=self.advantage, remedy=remedy)

    @property
    def needs_reference(self) -> bool:
        return bool(self.reward_kl_weight or self.loss.kl_weight)


@dataclass(frozen=True)
class PPO:
    """A value function and generalised advantages (arXiv 1707.06347); the KL to the reference is in the reward."""

    gamma: float = 1.0
    lam: float = 0.95
    reward_kl: str = "k1"
    reward_kl_weight: float = 0.01  # with `adaptive`: at the start
    adaptive: AdaptiveKL = field(default_factory=AdaptiveKL)
    value_clip: float = 0.2
    leaky: bool = False  # whitening and the value's loss read what was inserted too, as in Search-R1's published code
    loss: PolicyLoss = field(default_factory=PolicyLoss)

    @property
    def needs_reference(self) -> bool:
        return bool(self.reward_kl_weight or self.adaptive.target or self.loss.kl_weight)


def grpo_experience(net: Network, how: GRPO) -> Maker:
    """The jitted call (weights, frozen, batch) -> (experience, metrics)."""

    def make(weights: Any, frozen: Any, batch: ProcessBatch) -> tuple[Experience, dict[str, Array]]:
        logprob = net.logprobs(net.decoder(weights, frozen), batch)
        reference = net.reference(frozen, batch) if how.needs_reference else None
        reward = batch.reward
        if reference is not None and how.reward_kl_weight:
            kl = kl_estimate(how.reward_kl, jnp.where(batch.own, logprob, 0.0), jnp.where(batch.own, reference, 0.0))
            reward = reward - how.reward_kl_weight * jnp.sum(kl, axis=-1)
        group = batch.candidate_mask, batch.own
        advantage = group_advantages(how.advantage, reward, *group, eps=how.eps)
        if batch.token_reward is not None:
            steps = step_advantages(how.advantage, batch.token_reward, *group, gamma=how.gamma, eps=how.eps)
            advantage = advantage + steps
        made = Experience(batch, advantage, logprob, reference if how.loss.kl_weight else None)
        return made, _report(batch, logprob, reference)

    return jax.jit(make)


def ppo_experience_maker(net: Network, how: PPO) -> Maker:
    """The jitted call (weights, value weights, frozen, batch, kl_weight) -> (experience, metrics).

    The value function is a `Critic` whose `frozen` trunk under LoRA is the policy's base.
    """

    def make(
        weights: Any, value_weights: Any, frozen: Any, batch: ProcessBatch, kl_weight: Array
    ) -> tuple[Experience, dict[str, Array]]:
        logprob = net.logprobs(net.decoder(weights, frozen), batch)
        reference = net.reference(frozen, batch) if how.needs_reference else None
        value = net.values(net.critic(value_weights, frozen), batch)
        reward = token_rewards(batch, logprob, reference, kl=how.reward_kl, weight=kl_weight)
        made = ppo_experience(batch, reward, value, logprob, reference, how.gamma, how.lam, how.leaky)
        made = made.replace(reference_logprob=reference if how.loss.kl_weight else None)  # type: ignore[attr-defined]
        return made, _report(batch, logprob, reference)

    return jax.jit(make)


def _report(batch: ProcessBatch, logprob: Array, reference: Array | None) -> dict[str, Array]:
    """Mean reward and length, how far trainer and sampler disagree, and the KL to the reference per sequence (k1)."""
    own, real = batch.own, batch.candidate_mask
    gap = jnp.where(own, jnp.abs(logprob - batch.behaviour_logprob), 0.0)
    report = {
        "reward": masked_mean(batch.reward, real),
        "tokens": jnp.sum(own).astype(jnp.float32),
        "sequences": jnp.sum(real).astype(jnp.float32),
        "sampler_gap_mean": masked_mean(gap, own),
        "sampler_gap_max": jnp.max(gap),
    }
    if reference is not None:
        k1 = jnp.where(own, logprob - reference, 0.0)
        report["sequence_kl"] = masked_mean(jnp.sum(k1, axis=-1), real)
    return report
