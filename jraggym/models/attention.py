"""Attention over a union of key sets, and rotary positions.

Letters: X rows of the batch (B prompts or B * K branches), Y key sets, T tokens, S key slots, Q query heads,
G key/value heads, H head dim.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jraggym.models.architecture import RopeScaling

BLOCK = 256  # queries that `attend_back` takes at one time, or more of a long text
BLOCKS = 8  # the most that it unrolls


class Keys(NamedTuple):
    """One set of keys that queries attend to."""

    k: Array  # [Y, G, S, H]
    v: Array  # [Y, G, S, H]
    visible: Array  # bool, broadcasts to [X, Q, T, S], with 1, Y or X rows


def frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> Array:
    """How fast the pairs [H / 2] turn, in radians a position (RoFormer, arXiv 2104.09864), after scaling."""
    frequency = theta ** -(jnp.arange(0, head_dim, 2) / head_dim)
    if scaling is None or scaling.kind == "none":
        return frequency
    slow = frequency / scaling.factor
    if scaling.kind == "linear":
        return slow
    turns = scaling.original * frequency / (2 * jnp.pi)  # over the positions of the first training
    kept = jnp.clip((turns - scaling.low) / (scaling.high - scaling.low), 0.0, 1.0)
    return (1.0 - kept) * slow + kept * frequency


def rotary(position: Array, frequency: Array) -> tuple[Array, Array]:
    """Cosines and sines [X, 1, T, H / 2] for positions [X, T]."""
    angle = position[:, None, :, None] * frequency
    return jnp.cos(angle), jnp.sin(angle)


def soft_cap(x: Array, cap: float | None) -> Array:
    """cap * tanh(x / cap), which stays within (-cap, cap); x itself without a cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def turn(x: Array, angles: tuple[Array, Array]) -> Array:
    """Rotates the pairs (i, i + H / 2) of x [X, heads, T, H]."""
    cos, sin = angles
    left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1).astype(x.dtype)


def attend(q: Array, parts: list[Keys], scale: float, cap: float | None = None) -> Array:
    """Softmax attention of queries [X, Q, T, H] over the union of several key sets; returns [X, T, Q * H].

    Scores are soft_cap(scale * q . k, cap).

    X may be a multiple of a set's Y: the B * K branches share the keys of B prompts. Splitting is exact: with
    scores [s1 | s2], softmax(s) V = (e^s1 V1 + e^s2 V2) / (sum e^s1 + sum e^s2).
    """
    return settled(weigh(q * scale, parts, cap))


def attend_back(q: Array, keys: Keys, scale: float, cap: float | None = None) -> Array:
    """`attend` where no query sees a key behind its own place: [X, T, Q * H].

    Blocks of queries each meet the keys up to their own end: with n blocks, (n + 1) / 2n of all scores are computed.
    """
    size = q.shape[2]
    count = max(1, min(BLOCKS, -(-size // BLOCK)))
    ends = [size * (i + 1) // count for i in range(count)]

    def block(start: int, end: int) -> Array:
        before = Keys(keys.k[:, :, :end], keys.v[:, :, :end], keys.visible[..., start:end, :end])
        return attend(q[:, :, start:end], [before], scale, cap)

    return jnp.concatenate([block(start, end) for start, end in pairwise([0, *ends])], axis=1)


class Weighed(NamedTuple):
    """Values that are weighed by exp(score - top) and not divided by the weights' sum yet: more can come to them."""

    top: Array  # f32 [X, Q, T]  the highest score
    total: Array  # f32 [X, Q, T]  of the weights
    mixed: Array  # [X, Q, T, H]


def weigh(q: Array, parts: list[Keys], cap: float | None = None) -> Weighed:
    """What queries [X, Q, T, H], scaled already, read in several key sets."""
    scores = [_scores(q, part, cap) for part in parts]
    top = jax.lax.stop_gradient(jnp.max(jnp.stack([jnp.max(s, axis=-1, initial=-1e30) for s in scores]), axis=0))
    total, mixed = jnp.zeros(()), jnp.zeros((), q.dtype)
    for score, part in zip(scores, parts, strict=True):
        weight = jnp.exp(score - top[..., None])
        total = total + jnp.sum(weight, axis=-1)
        mixed = mixed + _mix(weight.astype(part.v.dtype), part.v)
    return Weighed(top, total, mixed)


def joined(a: Weighed, b: Weighed) -> Weighed:
    """What both have read."""
    top = jnp.maximum(a.top, b.top)
    of_a, of_b = jnp.exp(a.top - top), jnp.exp(b.top - top)
    mixed = a.mixed * of_a[..., None].astype(a.mixed.dtype) + b.mixed * of_b[..., None].astype(b.mixed.dtype)
    return Weighed(top, a.total * of_a + b.total * of_b, mixed)


def settled(found: Weighed) -> Array:
    """The attention's result [X, T, Q * H]."""
    x, heads, t, h = found.mixed.shape
    out = found.mixed / found.total[..., None].astype(found.mixed.dtype)
    return out.swapaxes(1, 2).reshape(x, t, heads * h)


def _scores(q: Array, part: Keys, cap: float | None) -> Array:
    """Masked scores [X, Q, T, S] in float32."""
    grouped = _group(q, *part.k.shape[:2])
    scores = jnp.einsum("ygrh,ygsh->ygrs", grouped, part.k, preferred_element_type=jnp.float32)
    rows = part.visible.shape[0]
    visible = part.visible if rows in (1, q.shape[0]) else jnp.repeat(part.visible, q.shape[0] // rows, axis=0)
    return jnp.where(visible, soft_cap(_ungroup(scores, q.shape[:3]), cap), -1e30)


def _mix(weight: Array, v: Array) -> Array:
    """Weighted values [X, Q, T, H]."""
    grouped = _group(weight, *v.shape[:2])
    return _ungroup(jnp.einsum("ygrs,ygsh->ygrh", grouped, v), weight.shape[:3])


def _group(y: Array, sets: int, groups: int) -> Array:
    """[X, Q, T, ...] -> [Y, G, (X/Y) * (Q/G) * T, ...]: all rows that share a key set, side by side."""
    x, heads, t, w = y.shape
    y = y.reshape(sets, x // sets, groups, heads // groups, t, w)
    return y.transpose(0, 2, 1, 3, 4, 5).reshape(sets, groups, (x // sets) * (heads // groups) * t, w)


def _ungroup(y: Array, shape: tuple[int, ...]) -> Array:
    """The inverse of `_group` for the shape (X, Q, T)."""
    x, heads, t = shape
    sets, groups, _, w = y.shape
    y = y.reshape(sets, groups, x // sets, heads // groups, t, w)
    return y.transpose(0, 2, 1, 3, 4, 5).reshape(x, heads, t, w)
