"""The objectives as functions of weights: what `training.Step` turns into one jitted step each.

    objective(weights, batch, frozen, key) -> (loss, metrics)

For all of them `frozen` is a decoder: the reference policy, and under LoRA at the same time the base, so that it is in
memory once. An objective is made once for equal arguments, so that runs which share it share its compilation.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import jax
from jax import Array
from jax.sharding import Mesh

from jraggym.batch import ProcessBatch
from jraggym.models.bert import BertConfig
from jraggym.models.bert_critic import BertCritic, pair_scores
from jraggym.models.critic import Critic
from jraggym.models.decoder import Decoder, DecoderConfig
from jraggym.models.lora import Lora, adapt
from jraggym.objectives.critic import critic_loss
from jraggym.objectives.dpo import dpo_loss
from jraggym.objectives.forward import (
    by_rows,
    candidate_scores,
    token_logprobs,
    token_logprobs_and_entropy,
    token_values,
)
from jraggym.objectives.policy import Experience, PolicyLoss, policy_loss
from jraggym.objectives.ppo import value_loss
from jraggym.objectives.sft import sft_loss


@dataclass(frozen=True, slots=True)
class Network:
    """How weights become a decoder or a critic, and how much of a batch goes through it at a time."""

    config: DecoderConfig
    lora: Lora | None = None  # then the trained weights are adapters, and `frozen` is their base
    parts: int = 1  # micro-batches; see forward.by_rows
    mesh: Mesh | None = None  # where weights and batch lie
    share: float = 1.0  # at most this share of the action positions are the policy's own tokens; more gives NaN

    @property
    def plain(self) -> Network:
        """The same numbers, with every activation kept: what it computes is the model's own work."""
        return replace(self, config=replace(self.config, remat="none"), parts=1)

    def decoder(self, weights: Any, frozen: Decoder | None, key: Array | None = None) -> Decoder:
        """The policy; dropout is on with a key."""
        return weights if self.lora is None else adapt(_given(frozen), weights, self.lora, key)

    def critic(self, weights: Critic, frozen: Decoder | None, key: Array | None = None) -> Critic:
        """The critic; under LoRA the trunk's adapters and the head are trained."""
        return replace(weights, trunk=self.decoder(weights.trunk, frozen, key))

    def logprobs(self, decoder: Decoder, batch: ProcessBatch) -> Array:
        """Log-probabilities [B, K, A]."""
        return by_rows(
            lambda w, b: token_logprobs(w, self.config, b, self._capacity(b), self.mesh), decoder, batch, self.parts
        )

    def logprobs_and_entropy(self, decoder: Decoder, batch: ProcessBatch) -> tuple[Array, Array]:
        """Log-probabilities and entropies [B, K, A]."""

        def forward(weights: Decoder, part: ProcessBatch) -> tuple[Array, Array]:
            return token_logprobs_and_entropy(weights, self.config, part, self._capacity(part), self.mesh)

        return by_rows(forward, decoder, batch, self.parts)

    def scores(self, critic: Critic, batch: ProcessBatch) -> Array:
        """Critic scores [B, K]."""
        return by_rows(lambda w, b: candidate_scores(w, self.config, b, self.mesh), critic, batch, self.parts)

    def values(self, critic: Critic, batch: ProcessBatch) -> Array:
        """Values [B, K, A]."""
        return by_rows(lambda w, b: token_values(w, self.config, b, self.mesh), critic, batch, self.parts)

    def reference(self, frozen: Decoder | None, batch: ProcessBatch) -> Array:
        """The reference's log-probabilities [B, K, A]: those kept beside the data, or computed here."""
        if batch.reference_logprob is not None:
            return batch.reference_logprob
        return jax.lax.stop_gradient(self.logprobs(_given(frozen), batch))

    def _capacity(self, batch: ProcessBatch) -> int:
        return int(self.share * batch.action.size)


def _given(frozen: Decoder | None) -> Decoder:
    if frozen is None:
        raise ValueError("this objective reads a frozen decoder: give the reference policy, or the base under LoRA")
    return frozen


@functools.cache
def sft(net: Network, *, weighted: bool = False):
    """Supervised fine-tuning; see `sft_loss`."""

    def objective(weights: Any, batch: ProcessBatch, frozen: Any, key: Array):
        return sft_loss(net.logprobs(net.decoder(weights, frozen, key), batch), batch, weighted=weighted)

    return objective


@functools.cache
def dpo(net: Network, **how):
    """Preference optimisation; `how` goes to `dpo_loss`."""

    def objective(weights: Any, batch: ProcessBatch, frozen: Any, key: Array):
        reference = net.reference(frozen, batch)
        return dpo_loss(net.logprobs(net.decoder(weights, frozen, key), batch), reference, batch, **how)

    return objective


@functools.cache
def critic(net: Network, **how):
    """The critic; `how` goes to `critic_loss`."""

    def objective(weights: Critic, batch: ProcessBatch, frozen: Any, key: Array):
        return critic_loss(net.scores(net.critic(weights, frozen, key), batch), batch, **how)

    return objective


@functools.cache
def pair_critic(config: BertConfig, frozen: int = 0, **how):
    """A critic of pairs of texts, see `pair_scores`, on batches of `evidence.training`; `how` goes to `critic_loss`."""

    def objective(weights: BertCritic, batch: Any, base: Any, key: Array):
        rows = batch.reward.size
        ids, kinds = (x.reshape(rows, -1) for x in (batch.ids, batch.kinds))
        score = pair_scores(weights, config, ids, kinds, frozen)
        return critic_loss(score.reshape(batch.reward.shape), batch, **how)

    return objective


@functools.cache
def policy(net: Network, how: PolicyLoss):
    """GRPO's and PPO's policy step on an `Experience`; see `policy_loss`."""

    def objective(weights: Any, batch: Experience, frozen: Any, key: Array):
        decoder, entropy = net.decoder(weights, frozen, key), None
        if how.entropy_weight:
            logprob, entropy = net.logprobs_and_entropy(decoder, batch.batch)
        else:
            logprob = net.logprobs(decoder, batch.batch)
        return policy_loss(logprob, batch, how, entropy)

    return objective


@functools.cache
def value(net: Network, *, clip: float = 0.2, leaky: bool = False):
    """PPO's value function on an `Experience`; see `value_loss`."""

    def objective(weights: Critic, batch: Experience, frozen: Any, key: Array):
        return value_loss(net.values(net.critic(weights, frozen, key), batch.batch), batch, clip=clip, leaky=leaky)

    return objective
