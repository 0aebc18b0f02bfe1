"""The decoder (RMSNorm, rotary positions, grouped-query attention, SwiGLU) as pure functions over typed weights.

Two functions carry training and inference alike:

    prefix_forward   one causal pass over the prompts                     -> keys and values of every layer
    branch_forward   K continuations of each prompt, attending to the prompt's keys and to their own

so a prompt is computed once however many candidates branch from it. Splitting the softmax over the two parts
is exact: with scores s = [s_prompt | s_own], softmax(s) V = (e^s_prompt V_prompt + e^s_own V_own) / sum(e^s).

Letters: B batch, P prompt tokens, K candidates, A branch tokens, S cache slots, D model, Q query heads,
G key/value heads, H head dim, F feed-forward, V vocabulary, N layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from jraggym.errors import InputError


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """Sizes and switches of a decoder; the defaults are the tiny CPU configuration."""

    vocab: int = 1024
    model: int = 96
    layers: int = 2
    query_heads: int = 2
    kv_heads: int = 2
    head_dim: int = 48
    feed_forward: int = 256
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    tied: bool = True
    bias: float = 0.0
    dtype: str = "float32"  # of activations; weights stay in float32
    remat: bool = False  # recompute layer activations in the backward pass

    def __post_init__(self) -> None:
        if self.query_heads % self.kv_heads:
            raise InputError(
                "query_heads must be a multiple of kv_heads",
                got=f"{self.query_heads} and {self.kv_heads}",
                remedy="Change one of them.",
            )
        if self.head_dim % 2:
            raise InputError("head_dim must be even", got=self.head_dim, remedy="Rotary positions turn pairs.")


class Spec(NamedTuple):
    """Shape, logical axes (see sharding.RULES) and initial standard deviation (0 means all ones) of a weight."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    scale: float


@struct.dataclass
class Layer:
    """The weights of all N layers, stacked."""

    attention_norm: Any  # [N, D]
    q: Any  # [N, D, Q * H]
    k: Any  # [N, D, G * H]
    v: Any  # [N, D, G * H]
    q_bias: Any  # [N, Q * H] or None
    k_bias: Any  # [N, G * H] or None
    v_bias: Any  # [N, G * H] or None
    o: Any  # [N, Q * H, D]
    mlp_norm: Any  # [N, D]
    gate: Any  # [N, D, F]
    up: Any  # [N, D, F]
    down: Any  # [N, F, D]


@struct.dataclass
class Decoder:
    """The trunk's weights; `unembed` is None when tied to `embed`."""

    embed: Any  # [V, D]
    layers: Layer
    final_norm: Any  # [D]
    unembed: Any  # [D, V] or None


@struct.dataclass
class Prefix:
    """Keys and values of the prompt tokens that branches attend to (all but the last one of each prompt)."""

    k: Array  # [N, B, G, P - 1, H]
    v: Array  # [N, B, G, P - 1, H]
    mask: Array  # bool [B, P - 1]
    start: Array  # int32 [B]  position of the last prompt token, where every branch begins


def specs(config: DecoderConfig) -> Decoder:
    """The one table of the decoder's weights, as a tree of `Spec`."""
    n, d, f = config.layers, config.model, config.feed_forward
    qh, gh = config.query_heads * config.head_dim, config.kv_heads * config.head_dim
    inner, outer = d**-0.5, (2 * n) ** -0.5  # the usual depth scaling of residual writes
    return Decoder(
        embed=Spec((config.vocab, d), ("vocab", "model"), d**-0.5),
        layers=Layer(
            attention_norm=Spec((n, d), ("layer", None), 0.0),
            q=Spec((n, d, qh), ("layer", "model", "heads"), inner),
            k=Spec((n, d, gh), ("layer", "model", "kv_heads"), inner),
            v=Spec((n, d, gh), ("layer", "model", "kv_heads"), inner),
            q_bias=Spec((n, qh), ("layer", "heads"), config.bias) if config.bias else None,
            k_bias=Spec((n, gh), ("layer", "kv_heads"), config.bias) if config.bias else None,
            v_bias=Spec((n, gh), ("layer", "kv_heads"), 1e-3) if config.bias else None,
            o=Spec((n, qh, d), ("layer", "heads", "model"), outer * qh**-0.5),
            mlp_norm=Spec((n, d), ("layer", None), 0.0),
            gate=Spec((n, d, f), ("layer", "model", "feed_forward"), inner),
            up=Spec((n, d, f), ("layer", "model", "feed_forward"), inner),
            down=Spec((n, f, d), ("layer", "feed_forward", "model"), outer * f**-0.5),
        ),
        final_norm=Spec((d,), (None,), 0.0),
        unembed=None if config.tied else Spec((d, config.vocab), ("model", "vocab"), inner),
    )


def is_spec(leaf: Any) -> bool:
    return isinstance(leaf, Spec)


def init(table: Any, key: Array) -> Any:
    """Draws float32 weights for a tree of `Spec`; each leaf's key depends on its place in the tree."""
    leaves, tree = jax.tree.flatten(table, is_leaf=is_spec)
    keys = jax.random.split(key, len(leaves))
    return tree.unflatten(
        jnp.ones(s.shape) if s.scale == 0.0 else s.scale * jax.random.truncated_normal(k, -3, 3, s.shape)
        for s, k in zip(leaves, keys, strict=True)
    )


def prefix_forward(weights: Decoder, config: DecoderConfig, prompt: Array, prompt_mask: Array) -> Prefix:
    """One causal pass over left-padded prompts.

    Args: prompt int32 [B, P]; prompt_mask bool [B, P], whose last column is real.
    Returns: the keys and values of tokens 0 .. P - 2; the last prompt token is each branch's first token.
    """
    position = jnp.cumsum(prompt_mask, axis=1) - 1
    mask, tokens, rotary = prompt_mask[:, :-1], prompt[:, :-1], _rotary(config, position[:, :-1])
    causal = jnp.tril(jnp.ones((tokens.shape[1],) * 2, bool))
    visible = (causal & mask[:, None, :])[:, None]  # [B, 1, T, T]

    def step(x: Array, layer: Layer) -> tuple[Array, tuple[Array, Array]]:
        q, k, v = _qkv(layer, config, x, rotary)
        attended = _attend(q, [(k, v, visible)], config)
        return _residual(layer, config, x, attended), (k, v)

    x = _embed(weights, config, tokens)
    _, (k, v) = jax.lax.scan(_remat(step, config), x, weights.layers)
    return Prefix(k, v, mask, position[:, -1])


def branch_forward(weights: Decoder, config: DecoderConfig, prefix: Prefix, tokens: Array, mask: Array) -> Array:
    """K continuations of each prompt in one pass.

    Args: tokens int32 [B, K, A], the first of which is the prompt's last token; mask bool [B, K, A], right-padded.
    Returns: the normalised last hidden states [B, K, A, D]; position j is the distribution of token j + 1.
    """
    b, k_, a = tokens.shape
    position = prefix.start[:, None, None] + jnp.arange(a)
    rotary = _rotary(config, jnp.broadcast_to(position, (b, k_, a)).reshape(b * k_, a))
    own = jnp.tril(jnp.ones((a, a), bool)) & mask.reshape(b * k_, 1, 1, a)
    shared = prefix.mask[:, None, None]  # [B, 1, 1, P - 1]

    def step(x: Array, inputs: tuple[Layer, Array, Array]) -> tuple[Array, None]:
        layer, prefix_k, prefix_v = inputs
        q, k, v = _qkv(layer, config, x, rotary)
        attended = _attend(q, [(prefix_k, prefix_v, shared), (k, v, own)], config)
        return _residual(layer, config, x, attended), None

    x = _embed(weights, config, tokens.reshape(b * k_, a))
    x, _ = jax.lax.scan(_remat(step, config), x, (weights.layers, prefix.k, prefix.v))
    return rms_norm(x, weights.final_norm, config.norm_eps).reshape(b, k_, a, config.model)


def decode_step(
    weights: Decoder, config: DecoderConfig, prefix: Prefix, cache: tuple[Array, Array], slot: Array, token: Array
) -> tuple[Array, tuple[Array, Array]]:
    """One more token of K branches of each prompt.

    Args: cache: keys and values [N, B * K, G, S, H] of the branch tokens so far; slot: how many there are;
      token int32 [B, K], which goes into that slot.
    Returns: the hidden states [B, K, D] and the cache with the slot filled.
    """
    b, k_ = token.shape
    position = jnp.repeat(prefix.start + slot, k_)[:, None]
    rotary = _rotary(config, position)
    own = (jnp.arange(cache[0].shape[3]) <= slot)[None, None, None]  # [1, 1, 1, S]
    shared = prefix.mask[:, None, None]

    def step(x: Array, inputs: tuple) -> tuple[Array, tuple[Array, Array]]:
        layer, prefix_k, prefix_v, own_k, own_v = inputs
        q, k, v = _qkv(layer, config, x, rotary)
        own_k = jax.lax.dynamic_update_slice_in_dim(own_k, k, slot, axis=2)
        own_v = jax.lax.dynamic_update_slice_in_dim(own_v, v, slot, axis=2)
        attended = _attend(q, [(prefix_k, prefix_v, shared), (own_k, own_v, own)], config)
        return _residual(layer, config, x, attended), (own_k, own_v)

    x = _embed(weights, config, token.reshape(b * k_, 1))
    x, cache = jax.lax.scan(step, x, (weights.layers, prefix.k, prefix.v, *cache))
    return rms_norm(x, weights.final_norm, config.norm_eps).reshape(b, k_, config.model), cache


def empty_cache(config: DecoderConfig, prefix: Prefix, candidates: int, slots: int) -> tuple[Array, Array]:
    """A cache for `slots` branch tokens of `candidates` branches of each prompt: two of [N, B * K, G, S, H]."""
    n, b, g, _, h = prefix.k.shape
    zeros = jnp.zeros((n, b * candidates, g, slots, h), prefix.k.dtype)
    return zeros, zeros


def unembedding(weights: Decoder) -> Array:
    """The matrix [D, V] from hidden states to logits."""
    return weights.embed.T if weights.unembed is None else weights.unembed


def rms_norm(x: Array, gain: Array, eps: float) -> Array:
    """x / rms(x) * gain over the last axis, in float32."""
    wide = x.astype(jnp.float32)
    scaled = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (scaled * gain).astype(x.dtype)


def _embed(weights: Decoder, config: DecoderConfig, tokens: Array) -> Array:
    # Rows are drawn with standard deviation D^-0.5 (right for the tied logits); D^0.5 makes them unit inputs.
    return weights.embed[tokens].astype(config.dtype) * config.model**0.5


def _rotary(config: DecoderConfig, position: Array) -> tuple[Array, Array]:
    """Cosines and sines [X, 1, T, H / 2] for positions [X, T] (RoFormer, arXiv 2104.09864)."""
    frequency = config.rope_theta ** -(jnp.arange(0, config.head_dim, 2) / config.head_dim)
    angle = position[:, None, :, None] * frequency
    return jnp.cos(angle), jnp.sin(angle)


def _turn(x: Array, rotary: tuple[Array, Array]) -> Array:
    """Rotates the pairs (i, i + H / 2) of x [X, heads, T, H]."""
    cos, sin = rotary
    left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1).astype(x.dtype)


def _qkv(layer: Layer, config: DecoderConfig, x: Array, rotary: tuple[Array, Array]) -> tuple[Array, Array, Array]:
    """Queries [X, Q, T, H] and keys, values [X, G, T, H] of hidden states [X, T, D]."""
    x = rms_norm(x, layer.attention_norm, config.norm_eps)

    def heads(matrix: Array, bias: Array | None, count: int) -> Array:
        y = _matmul(x, matrix)
        y = y if bias is None else y + bias.astype(y.dtype)
        return y.reshape(*x.shape[:2], count, config.head_dim).swapaxes(1, 2)

    q, k = heads(layer.q, layer.q_bias, config.query_heads), heads(layer.k, layer.k_bias, config.kv_heads)
    return _turn(q, rotary), _turn(k, rotary), heads(layer.v, layer.v_bias, config.kv_heads)


def _attend(q: Array, parts: list[tuple[Array, Array, Array]], config: DecoderConfig) -> Array:
    """Attention of queries [X, Q, T, H] over the union of several key sets, each (k, v, visible).

    A part has k, v [Y, G, S, H], where X is a multiple of Y (X = B * K branches share Y = B prompts), and
    `visible` broadcasts to [Y, 1, rows or 1, S] for that part's grouping of rows. Returns [X, T, Q * H].
    """
    x, heads, t, h = q.shape
    scores = [_scores(q * h**-0.5, k, visible, config) for k, _, visible in parts]
    top = jax.lax.stop_gradient(jnp.max(jnp.stack([jnp.max(s, axis=-1) for s in scores]), axis=0))
    total, mixed = 0.0, 0.0
    for score, (_, v, _) in zip(scores, parts, strict=True):
        weight = jnp.exp(score - top[..., None])
        total = total + jnp.sum(weight, axis=-1)
        mixed = mixed + _mix(weight.astype(v.dtype), v, config)
    out = mixed / total[..., None].astype(mixed.dtype)
    return out.swapaxes(1, 2).reshape(x, t, heads * h)


def _group(y: Array, sets: int, groups: int) -> Array:
    """[X, Q, T, ...] -> [Y, G, (X/Y) * (Q/G) * T, ...]: all rows that share a key set, side by side."""
    x, heads, t, w = y.shape
    y = y.reshape(sets, x // sets, groups, heads // groups, t, w)
    return y.transpose(0, 2, 1, 3, 4, 5).reshape(sets, groups, -1, w)


def _ungroup(y: Array, shape: tuple[int, int, int]) -> Array:
    """The inverse of `_group` for the shape (X, Q, T)."""
    x, heads, t = shape
    sets, groups, _, w = y.shape
    y = y.reshape(sets, groups, x // sets, heads // groups, t, w)
    return y.transpose(0, 2, 1, 3, 4, 5).reshape(x, heads, t, w)


def _scores(q: Array, k: Array, visible: Array, config: DecoderConfig) -> Array:
    """Masked scores [X, Q, T, S] in float32."""
    grouped = _group(q, *k.shape[:2])
    scores = jnp.einsum("ygrh,ygsh->ygrs", grouped, k, preferred_element_type=jnp.float32)
    scores = _ungroup(scores, q.shape[:3])
    visible = jnp.repeat(visible, q.shape[0] // visible.shape[0], axis=0) if visible.shape[0] > 1 else visible
    return jnp.where(visible, scores, -1e30)


def _mix(weight: Array, v: Array, config: DecoderConfig) -> Array:
    """Weighted values [X, Q, T, H]."""
    grouped = _group(weight, *v.shape[:2])
    return _ungroup(jnp.einsum("ygrs,ygsh->ygrh", grouped, v), weight.shape[:3])


def _residual(layer: Layer, config: DecoderConfig, x: Array, attended: Array) -> Array:
    x = x + _matmul(attended, layer.o)
    y = rms_norm(x, layer.mlp_norm, config.norm_eps)
    return x + _matmul(jax.nn.silu(_matmul(y, layer.gate)) * _matmul(y, layer.up), layer.down)


def _matmul(x: Array, matrix: Array) -> Array:
    """x @ matrix as one flat product: XLA's CPU backend is fastest on two-dimensional operands."""
    flat = x.reshape(-1, x.shape[-1]) @ matrix.astype(x.dtype)
    return flat.reshape(*x.shape[:-1], -1)


def _remat(step: Callable, config: DecoderConfig) -> Callable:
    return jax.checkpoint(step) if config.remat else step
