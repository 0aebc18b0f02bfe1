"""Log-probabilities of given tokens, and entropies, without the [T, V] array of logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from jraggym.models.attention import soft_cap
from jraggym.sharding import RULES, batch_shards

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


def on_rows(function: Callable[..., Any], mesh: Mesh | None) -> Callable[..., Any]:
    """function(matrix [D, V], *tokens [B, T, ...]) -> results [B, T], where on a mesh each device does its own tokens.

    Left to itself, XLA would cut the chunks across devices, and each device would compute the logits of all. The matrix
    is gathered once; over "tensor" the tokens of a row are split, not the vocabulary.
    """

    def split(matrix: Array, *tokens: Array) -> Any:
        b, t = tokens[0].shape[:2]
        if mesh is None or mesh.size == 1 or b % batch_shards(mesh):
            return function(matrix, *tokens)
        place = PartitionSpec(RULES["batch"], None if t % mesh.shape["tensor"] else "tensor")
        given = (PartitionSpec(), *(place for _ in tokens))
        return jax.shard_map(function, mesh=mesh, in_specs=given, out_specs=place, check_vma=False)(matrix, *tokens)

    return split


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
