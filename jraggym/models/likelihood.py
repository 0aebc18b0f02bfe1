"""Log-probabilities of given tokens without the [T, V] array of logits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

CHUNK = 2048  # tokens whose logits [CHUNK, V] exist at one time


def chunked_logprobs(hidden: Array, matrix: Array, targets: Array) -> Array:
    """log softmax(hidden @ matrix)[target] for hidden [T, D], matrix [D, V], targets int [T], without a [T, V] array.

    Chunks of logits are recomputed in the backward pass.
    """
    t, d = hidden.shape
    count = -(-t // CHUNK)
    size = -(-t // count)
    hidden = jnp.pad(hidden, ((0, count * size - t), (0, 0))).reshape(count, size, d)
    targets = jnp.pad(targets, (0, count * size - t)).reshape(count, size)
    matrix = matrix.astype(hidden.dtype)

    @jax.checkpoint
    def one(chunk: tuple[Array, Array]) -> Array:
        logits = (chunk[0] @ matrix).astype(jnp.float32)
        return jnp.take_along_axis(logits, chunk[1][:, None], axis=1)[:, 0] - jax.nn.logsumexp(logits, axis=1)

    return jax.lax.map(one, (hidden, targets)).reshape(-1)[:t]
