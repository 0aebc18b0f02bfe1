"""A cache of growing transcripts: each of B slots keeps the keys of its whole episode across turns.

    put_in      what a turn brings (a prompt, an observation) is computed behind what is there, in blocks of rows
    share       a new episode of a question that another slot has begins with a copy of that slot's prompt
    merge       the keys of a sampled piece of text go behind each slot's own

A slot holds the keys of its first `length` tokens; `last` is the token after them, which is fed next. So a turn's
prefill is as long as what is new in it, however long the episode has become. Attention reads the slots where they lie,
`rows` at a time and chunk by chunk, as far as the longest of these rows: no row pays for the longest one of all.

Letters: B slots, R rows of a block, W tokens of a block, C tokens of a piece, S cache slots, Q query heads,
G key/value heads, H head dim, N layers.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from jraggym.models.architecture import Decoder, DecoderConfig, Layer
from jraggym.models.attention import Keys, Weighed, joined, settled, weigh
from jraggym.models.decoder import angles_at, embed, local_layers, of_layer, qkv, residual, rms_norm, seen

CHUNK = 256  # keys of a slot that are read at one time; what lies behind its text is not read


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
    """Empty slots for `size` tokens each, rounded up to whole chunks."""
    size = -(-size // CHUNK) * CHUNK
    zeros = jnp.zeros((config.layers, rows, config.kv_heads, size, config.head_dim), config.dtype)
    return Slots(zeros, zeros, jnp.zeros(rows, jnp.int32), jnp.zeros(rows, jnp.int32))


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
    k, v = extend_forward(weights, config, slots, rows % slots.length.shape[0], length, tokens)
    kept = {"k": _write(slots.k, k, rows, length), "v": _write(slots.v, v, rows, length)}
    return slots.replace(**kept, length=slots.length.at[rows].add(count, mode="drop"))  # type: ignore[attr-defined]


def extend_forward(
    weights: Decoder, config: DecoderConfig, slots: Slots, rows: Array, length: Array, tokens: Array
) -> tuple[Array, Array]:
    """Keys and values [N, R, G, W, H] of tokens [R, W] that follow the first `length` [R] ones of slots `rows` [R]."""
    width = tokens.shape[1]
    position = length[:, None] + jnp.arange(width)
    angles = angles_at(config, position)
    behind = jnp.arange(width)[:, None] - jnp.arange(width)
    own = seen(config, (behind >= 0)[None, None], behind)

    def step(x: Array, inputs: tuple) -> tuple[Array, tuple[Array, Array]]:
        layer, n, local = inputs
        assert isinstance(layer, Layer)
        q, k, v = qkv(layer, config, x, of_layer(angles, local))
        q = q * config.score_scale
        found = weigh(q, [Keys(k, v, of_layer(own, local))], config.score_cap)
        found = _read(config, slots, n, local, rows, length, position, q, found)
        return residual(layer, config, x, settled(found)), (k, v)

    x = embed(weights, config, tokens)
    return jax.lax.scan(step, x, (weights.layers, jnp.arange(config.layers), local_layers(config)))[1]


def empty_piece(config: DecoderConfig, slots: Slots, piece: int) -> tuple[Array, Array]:
    """A small cache for `piece` tokens of each slot: two of [N, B, G, C, H]."""
    n, b, g, _, h = slots.k.shape
    zeros = jnp.zeros((n, b, g, piece, h), slots.k.dtype)
    return zeros, zeros


def slots_step(
    weights: Decoder,
    config: DecoderConfig,
    slots: Slots,
    active: Array,
    cache: tuple[Array, Array],
    place: Array,
    token: Array,
    rows: int,
) -> tuple[Array, tuple[Array, Array]]:
    """One more token [B] in each slot, behind its text and the `place` tokens of the piece's `cache`.

    Args: active bool [B]: slots that matter, no others are read; rows: how many are read together, divides B.
    Returns: the hidden states [B, D] and the cache with the place filled.
    """
    b, _, piece = token.shape[0], *cache[0].shape[2:4]
    position, there = (slots.length + place)[:, None], jnp.where(active, slots.length, 0)
    angles = angles_at(config, position)
    past = seen(config, (jnp.arange(piece) < place)[None, None, None], place - jnp.arange(piece))
    itself = jnp.ones((1, 1, 1, 1), bool)

    def step(x: Array, inputs: tuple) -> tuple[Array, tuple[Array, Array]]:
        layer, n, local, past_k, past_v = inputs
        q, k, v = qkv(layer, config, x, of_layer(angles, local))
        q = q * config.score_scale
        own = weigh(q, [Keys(past_k, past_v, of_layer(past, local)), Keys(k, v, itself)], config.score_cap)

        def block(i: Array, found: Weighed) -> Weighed:
            def part(x: Array) -> Array:
                return jax.lax.dynamic_slice_in_dim(x, i * rows, rows)

            given = _read(
                config, slots, n, local, i * rows + jnp.arange(rows), part(there), part(position), part(q),
                Weighed(*map(part, found)),
            )  # fmt: skip
            whole = [jax.lax.dynamic_update_slice_in_dim(x, y, i * rows, 0) for x, y in zip(found, given, strict=True)]
            return Weighed(*whole)

        found = jax.lax.fori_loop(0, b // rows, block, own)
        return residual(layer, config, x, settled(found)), (k, v)

    x = embed(weights, config, token[:, None])
    x, now = jax.lax.scan(step, x, (weights.layers, jnp.arange(config.layers), local_layers(config), *cache))

    # After the scan, so that a loop around this function updates one place and copies no cache.
    def put(cached: Array, new: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(cached, new, place, axis=3)

    return rms_norm(x, weights.final_norm, config)[:, 0], (put(cache[0], now[0]), put(cache[1], now[1]))


def _read(
    config: DecoderConfig,
    slots: Slots,
    n: Array,
    local: Array | None,
    rows: Array,
    length: Array,
    position: Array,
    q: Array,
    found: Weighed,
) -> Weighed:
    """`found` and what queries [R, Q, T, H] at positions [R, T] read in the first `length` [R] keys of slots `rows`."""

    def chunk(c: Array, found: Weighed) -> Weighed:
        place = c * CHUNK + jnp.arange(CHUNK)
        back = position[:, :, None] - place
        visible = seen(config, (place < length[:, None])[:, None, None], back[:, None])
        k, v = (_part(cache, n, rows, c * CHUNK) for cache in (slots.k, slots.v))
        return joined(found, weigh(q, [Keys(k, v, of_layer(visible, local))], config.score_cap))

    return jax.lax.fori_loop(0, -(-jnp.max(length) // CHUNK), chunk, found)


def _part(cache: Array, n: Array, rows: Array, at: Array) -> Array:
    """A chunk [R, G, CHUNK, H] of layer n of slots `rows`, from place `at` on."""
    _, _, g, _, h = cache.shape

    def of(row: Array) -> Array:
        return jax.lax.dynamic_slice(cache, (n, row, 0, at, 0), (1, 1, g, CHUNK, h))[0]

    # One row is a plain slice; for several, XLA gathers.
    return of(rows[0]) if len(rows) == 1 else jax.vmap(of)(rows)[:, 0]


def _write(cache: Array, new: Array, rows: Array, at: Array) -> Array:
    """The cache [N, B, G, S, H] with new [N, R, G, W, H] in rows [R] from place `at` [R] on.

    Rows that are B, which come last, are nowhere. One row after the other, in place.
    """

    def put(i: Array, cache: Array) -> Array:
        piece = jax.lax.dynamic_slice_in_dim(new, i, 1, axis=1)
        return jax.lax.dynamic_update_slice(cache, piece, (0, rows[i], 0, at[i], 0))

    return jax.lax.fori_loop(0, jnp.sum(rows < cache.shape[1]), put, cache)
