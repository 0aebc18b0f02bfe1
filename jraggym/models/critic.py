"""The critic (process reward model): a decoder trunk with a scalar head that reads an action's last token."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import struct
from jax import Array
from jax.sharding import Mesh

from jraggym.models.decoder import Decoder, DecoderConfig, Prefix, Spec, branch_forward, specs, unembedding
from jraggym.models.likelihood import chunked_logprobs, on_rows


@struct.dataclass
class Critic:
    """r(s, a) = hidden(s, a)[last token] . head  (RAG-Gym 2.2.2, equation 1).

    With `likelihood`, r(s, a) also counts likelihood * log p(a | s) under the trunk's own language model: what a
    small trunk knows about an action (is this name copied rightly?) lies in its predictions before each token.
    """

    trunk: Decoder
    head: Any  # [D]
    likelihood: Any = None  # [] or None


def critic_specs(config: DecoderConfig, *, likelihood: bool = False) -> Critic:
    """The critic's weight table; its trunk is the decoder's, and a likelihood weight starts at 1."""
    head = Spec((config.model,), ("model",), 0.1 * config.model**-0.5)
    return Critic(specs(config), head, Spec((), (), 0.0) if likelihood else None)


def critic_scores(weights: Critic, config: DecoderConfig, prefix: Prefix, tokens: Array, mask: Array) -> Array:
    """Scores [B, K] of branches.

    Args: prefix from the critic's own trunk; tokens, mask [B, K, A], the first token being the prompt's last.
    """
    hidden = branch_forward(weights.trunk, config, prefix, tokens, mask)
    return scores_of_hidden(weights, config, hidden, tokens, mask)


def scores_of_hidden(
    weights: Critic, config: DecoderConfig, hidden: Array, tokens: Array, mask: Array, mesh: Mesh | None = None
) -> Array:
    """Scores [B, K] from the trunk's hidden states [B, K, A, D] of the branches; `mesh` is where they lie."""
    last = jnp.maximum(jnp.sum(mask, axis=-1) - 1, 0)
    final = jnp.take_along_axis(hidden, last[..., None, None], axis=2)[:, :, 0]
    score = (final @ weights.head).astype(jnp.float32)
    if weights.likelihood is None:
        return score

    def of_tokens(matrix: Array, before: Array, targets: Array) -> Array:
        flat = before.reshape(-1, before.shape[-1])
        return chunked_logprobs(flat, matrix, targets.reshape(-1), config.final_cap).reshape(targets.shape)

    b, k, a = tokens[:, :, 1:].shape
    matrix, before = unembedding(weights.trunk).astype(hidden.dtype), hidden[:, :, :-1].reshape(b, k * a, -1)
    logprob = on_rows(of_tokens, mesh)(matrix, before, tokens[:, :, 1:].reshape(b, k * a)).reshape(b, k, a)
    logprob = jnp.where(mask[:, :, 1:], logprob, 0.0)
    return score + weights.likelihood * jnp.sum(logprob, axis=-1)
