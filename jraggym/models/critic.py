"""The critic (process reward model): a decoder trunk with a scalar head that reads an action's last token."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import struct
from jax import Array

from jraggym.models.decoder import Decoder, DecoderConfig, Prefix, Spec, branch_forward, specs


@struct.dataclass
class Critic:
    """r(s, a) = hidden(s, a)[last token] . head  (RAG-Gym 2.2.2, equation 1)."""

    trunk: Decoder
    head: Any  # [D]


def critic_specs(config: DecoderConfig) -> Critic:
    """The critic's weight table; its trunk is the decoder's."""
    return Critic(specs(config), Spec((config.model,), ("model",), 0.1 * config.model**-0.5))


def critic_scores(weights: Critic, config: DecoderConfig, prefix: Prefix, tokens: Array, mask: Array) -> Array:
    """Scores [B, K] of branches.

    Args: prefix from the critic's own trunk; tokens, mask [B, K, A], the first token being the prompt's last.
    """
    hidden = branch_forward(weights.trunk, config, prefix, tokens, mask)
    last = jnp.maximum(jnp.sum(mask, axis=-1) - 1, 0)
    final = jnp.take_along_axis(hidden, last[..., None, None], axis=2)[:, :, 0]
    return (final @ weights.head).astype(jnp.float32)
