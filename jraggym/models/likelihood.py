"""Log-probabilities of given tokens, and entropies, without the [T, V] array of logits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from jraggym.models.attention import soft_cap

CHUNK = 2048  # tokens whose logits [CHUNK, V] exist at one time


def chunked_logprobs(hidden: Array, matrix: Array, targets: Array, cap: float | None = None) -> Array:
    """log softmax(hidden @ matrix)[target] for hidden [T, D], matrix [D, V], targets int [T], without a [T, V] array.

    `cap` is the configuration's `final_cap`. Chunks of logits are recomputed in the backward pass.
    """

    def one(logits: Array, target: Array) -> Array:
        return jnp.take_along_axis(logits, target[:, None], axis=1)[:, 0] - jax.nn.logsumexp(logits, axis=1)

    return _by_chunks(one, hidden, matrix, targets, cap)


def chunked_logprobs_and_entropy(
    hidden: Array, matrix: Array, targets: Array, cap: float | None = None
) -> tuple[Array, Array]:
    """The same, and the entropy [T] of each token's distribution, in nats: log sum e^z - sum p z."""

    def one(logits: Array, target: Array) -> tuple[Array, Array]:
        total = jax.nn.logsumexp(logits, axis=1)
        mean = jnp.sum(jax.nn.softmax(logits, axis=1) * logits, axis=1)
        return jnp.take_along_axis(logits, target[:, None], axis=1)[:, 0] - total, total - mean

    return _by_chunks(one, hidden, matrix, targets, cap)


def _by_chunks(function, hidden: Array, matrix: Array, targets: Array, cap: float | None):
    """function(logits [CHUNK, V], targets [CHUNK]) for all T tokens; its results [CHUNK] become [T]."""
    t, d = hidden.shape
    count = -(-t // CHUNK)
    size = -(-t // count)
    hidden = jnp.pad(hidden, ((0, count * size - t), (0, 0))).reshape(count, size, d)
    targets = jnp.pad(targets, (0, count * size - t)).reshape(count, size)
    matrix = matrix.astype(hidden.dtype)

    @jax.checkpoint
    def one(chunk: tuple[Array, Array]):
        return function(soft_cap((chunk[0] @ matrix).astype(jnp.float32), cap), chunk[1])

    return jax.tree.map(lambda x: x.reshape(-1)[:t], jax.lax.map(one, (hidden, targets)))
