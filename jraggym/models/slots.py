"""A cache of growing transcripts: each of B slots keeps the keys of its whole episode across turns.

    put_in      what a turn brings (a prompt, an observation) is computed behind what is there, in blocks of rows
    share       a new episode of a question that another slot has begins with a copy of that slot's prompt
    merge       the keys of a sampled piece of text go behind each slot's own

A slot holds the keys of its first `length` tokens; `last` is the token after them, which is fed next. So a turn's
prefill is as long as what is new in it, however long the episode has become.

Letters: B slots, R rows of a block, W tokens of a block, S cache slots, G key/value heads, H head dim, N layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from jraggym.models.architecture import Decoder, DecoderConfig, Layer
from jraggym.models.attention import Keys, attend
from jraggym.models.decoder import Prefix, angles_at, embed, local_layers, of_layer, qkv, residual, seen


@struct.dataclass
class Slots:
    """The cache, and where each slot stands."""

    k: Array  # [N, B, G, S, H]
    v: Array  # [N, B, G, S, H]
    length: Array  # int32 [B]  tokens whose keys are there
    last: Array  # int32 [B]  the token behind them


@struct.dataclass
class News:
    """What comes into each slot: `count` tokens behind its first `start` ones, which stay."""

    tokens: Array  # int32 [B, X]
    count: Array  # int32 [B]
    start: Array  # int32 [B]
    last: Array  # int32 [B]  the token behind them, which is fed first when the slot goes on
    donor: Array  # int32 [B]  the slot whose first `start` keys are copied, or -1


def empty_slots(config: DecoderConfig, rows: int, size: int) -> Slots:
    """Empty slots for `size` tokens each."""
    zeros = jnp.zeros((config.layers, rows, config.kv_heads, size, config.head_dim), config.dtype)
    return Slots(zeros, zeros, jnp.zeros(rows, jnp.int32), jnp.zeros(rows, jnp.int32))


def as_prefix(slots: Slots, size: int) -> Prefix:
    """The first `size` cache slots as what `decode_step` continues."""
    mask = jnp.arange(size) < slots.length[:, None]
    return Prefix(slots.k[:, :, :, :size], slots.v[:, :, :, :size], mask, slots.length)


def by_length(longest: Array, size: int, compute: Callable[[int], Any]) -> Any:
    """compute(s) with s the smallest of size / 4, size / 2 and size that is >= longest: short texts are cheap."""
    sizes = [size // 4, size // 2, size]
    branches = [lambda s=s: compute(s) for s in sizes]
    return jax.lax.switch(jnp.sum(longest > jnp.array(sizes[:-1])), branches)


def merge(slots: Slots, k: Array, v: Array, fed: Array, last: Array) -> Slots:
    """Puts the first `fed` [B] of new keys and values [N, B, G, W, H] behind each slot's own."""
    rows = jnp.arange(slots.length.shape[0])
    kept = {"k": _write(slots.k, k, rows, slots.length), "v": _write(slots.v, v, rows, slots.length)}
    return Slots(**kept, length=slots.length + fed, last=last)


def share(slots: Slots, news: News) -> Slots:
    """Copies the prompts of donors: where donor >= 0, the slot begins with the donor's first `start` tokens."""

    (takers,) = jnp.nonzero(news.donor >= 0, size=news.donor.shape[0], fill_value=0)

    def copy(i: Array, cache: Array) -> Array:
        row = jax.lax.dynamic_slice_in_dim(cache, news.donor[takers[i]], 1, axis=1)
        return jax.lax.dynamic_update_slice_in_dim(cache, row, takers[i], axis=1)

    def copies(cache: Array) -> Array:
        return jax.lax.fori_loop(0, jnp.sum(news.donor >= 0), copy, cache)

    return slots.replace(k=copies(slots.k), v=copies(slots.v))  # type: ignore[attr-defined]


def put_in(
    weights: Decoder, config: DecoderConfig, slots: Slots, news: News, rows: int, width: int
) -> tuple[Slots, Array]:
    """Computes the news in blocks of `rows` slots and `width` tokens, then copies the prompts of donors.

    Returns: the slots, ready to go on, and the number of blocks. What it costs is what is new, rounded up to blocks.
    A cache needs `width` slots more than its longest text.
    """
    b, x = news.tokens.shape
    tokens = jnp.pad(news.tokens, ((0, 0), (0, width)))

    def pending(done: Array) -> Array:
        return done < news.count

    def block(carry: tuple) -> tuple:
        slots, done, blocks = carry
        (picked,) = jnp.nonzero(pending(done), size=rows, fill_value=b)
        place = done.at[picked].get(mode="fill", fill_value=x)
        part = jax.vmap(lambda i, at: jax.lax.dynamic_slice_in_dim(tokens[i], at, width))(picked % b, place)
        count = jnp.clip(news.count.at[picked].get(mode="fill", fill_value=0) - place, 0, width)
        slots = _block(weights, config, slots, picked, part, count)
        return slots, done.at[picked].add(count, mode="drop"), blocks + 1

    start = slots.replace(length=news.start)  # type: ignore[attr-defined]
    filled, _, blocks = jax.lax.while_loop(
        lambda carry: jnp.any(pending(carry[1])), block, (start, jnp.zeros(b, jnp.int32), jnp.int32(0))
    )
    return share(filled, news).replace(last=news.last), blocks  # type: ignore[attr-defined]


def _block(weights: Decoder, config: DecoderConfig, slots: Slots, rows: Array, tokens: Array, count: Array) -> Slots:
    """W tokens [R, W] behind the texts of slots `rows` [R] (B for none), of which the first `count` are real."""
    length = slots.length.at[rows].get(mode="fill", fill_value=0)

    def compute(size: int) -> tuple[Array, Array]:
        at = rows % slots.length.shape[0]
        mask = jnp.arange(size) < length[:, None]
        prefix = Prefix(slots.k[:, at, :, :size], slots.v[:, at, :, :size], mask, length)
        return extend_forward(weights, config, prefix, tokens)

    k, v = by_length(jnp.max(length), slots.k.shape[3], compute)
    kept = {"k": _write(slots.k, k, rows, length), "v": _write(slots.v, v, rows, length)}
    return slots.replace(**kept, length=slots.length.at[rows].add(count, mode="drop"))  # type: ignore[attr-defined]


def extend_forward(weights: Decoder, config: DecoderConfig, prefix: Prefix, tokens: Array) -> tuple[Array, Array]:
    """Keys and values [N, R, G, W, H] of tokens [R, W] that follow a prefix, from its position `start` on."""
    width = tokens.shape[1]
    position = prefix.start[:, None] + jnp.arange(width)
    angles = angles_at(config, position)
    behind = jnp.arange(width)[:, None] - jnp.arange(width)
    own = seen(config, (behind >= 0)[None, None], behind)
    back = position[:, :, None] - (jnp.cumsum(prefix.mask, axis=1) - 1)[:, None]
    before = seen(config, prefix.mask[:, None, None], back[:, None])

    def step(x: Array, inputs: tuple) -> tuple[Array, tuple[Array, Array]]:
        layer, local, prefix_k, prefix_v = inputs
        assert isinstance(layer, Layer)
        q, k, v = qkv(layer, config, x, of_layer(angles, local))
        keys = [Keys(prefix_k, prefix_v, of_layer(before, local)), Keys(k, v, of_layer(own, local))]
        return residual(layer, config, x, attend(q, keys, config.score_scale, config.score_cap)), (k, v)

    x = embed(weights, config, tokens)
    return jax.lax.scan(step, x, (weights.layers, local_layers(config), prefix.k, prefix.v))[1]


def _write(cache: Array, new: Array, rows: Array, at: Array) -> Array:
    """The cache [N, B, G, S, H] with new [N, R, G, W, H] in rows [R] from place `at` [R] on.

    Rows that are B, which come last, are nowhere. One row after the other, in place.
    """

    def put(i: Array, cache: Array) -> Array:
        piece = jax.lax.dynamic_slice_in_dim(new, i, 1, axis=1)
        return jax.lax.dynamic_update_slice(cache, piece, (0, rows[i], 0, at[i], 0))

    return jax.lax.fori_loop(0, jnp.sum(rows < cache.shape[1]), put, cache)
