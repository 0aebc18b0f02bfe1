"""The product with a weight matrix, plain or with a low-rank update."""

from __future__ import annotations

import math
from typing import Any

import jax
from flax import struct
from jax import Array


@struct.dataclass
class LowRank:
    """A matrix [in, out] that acts as base + scale * a @ b  (LoRA, arXiv 2106.09685); all may lead with [N]."""

    base: Any  # [in, out]
    a: Any  # [in, R]
    b: Any  # [R, out]
    scale: float = struct.field(pytree_node=False)
    dropout: float = struct.field(pytree_node=False, default=0.0)  # of what goes into a, while `key` is given
    key: Any = None


def matmul(x: Array, matrix: Any) -> Array:
    """x [..., in] @ matrix [in, out], an array or a `LowRank`.

    As one flat product: XLA's CPU backend is fastest on two-dimensional operands.
    """
    flat = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    if isinstance(matrix, LowRank):
        low = _dropped(flat, matrix) @ matrix.a.astype(x.dtype) @ matrix.b.astype(x.dtype)
        out = flat @ matrix.base.astype(x.dtype) + matrix.scale * low
    else:
        out = flat @ matrix.astype(x.dtype)
    return out.reshape(*x.shape[:-1], out.shape[-1])


def _dropped(x: Array, matrix: LowRank) -> Array:
    if matrix.key is None or not matrix.dropout:
        return x
    kept = jax.random.bernoulli(matrix.key, 1 - matrix.dropout, x.shape)
    return jax.numpy.where(kept, x / (1 - matrix.dropout), 0).astype(x.dtype)
