"""The decoder (RMSNorm, rotary positions, grouped-query attention, SwiGLU) as pure functions over typed weights.

Two functions carry training and inference alike:

    prefix_forward   one causal pass over the prompts                     -> keys and values of every layer
    branch_forward   K continuations of each prompt, attending to the prompt's keys and to their own

so a prompt is computed once however many candidates branch from it.

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
from jraggym.models.attention import Keys, attend, rotary, turn
from jraggym.models.linear import matmul

REMAT = {
    "none": None,  # keep every activation
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # keep products with weights, recompute the rest
    "layer": jax.checkpoint_policies.nothing_saveable,  # keep each layer's input only
}
ATTENTION = ("xla", "splash", "cudnn")


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """Sizes and switches of a decoder; the defaults are the tiny CPU configuration."""

    vocab: int = 1024
    model: int = 96
    layers: int = 2
    query_heads: int = 3
    kv_heads: int = 3
    head_dim: int = 48
    feed_forward: int = 256
    rope_theta: float = 1_000.0
    norm_eps: float = 1e-6
    tied: bool = True
    qkv_bias: bool = True  # as in Qwen2
    dtype: str = "float32"  # of activations; weights stay in float32
    remat: str = "none"  # what the backward pass recomputes, see REMAT
    attention: str = "xla"  # two-part attention anywhere; "splash" on TPU and "cudnn" on GPU, see models/packed.py

    def __post_init__(self) -> None:
        if self.query_heads % self.kv_heads:
            raise InputError(
                "query_heads must be a multiple of kv_heads",
                got=f"{self.query_heads} and {self.kv_heads}",
                remedy="Change one of them.",
            )
        if self.head_dim % 2:
            raise InputError("head_dim must be even", got=self.head_dim, remedy="Rotary positions turn pairs.")
        for name, known in (("remat", tuple(REMAT)), ("attention", ATTENTION)):
            if getattr(self, name) not in known:
                remedy = f"Use one of {', '.join(known)}."
                raise InputError(f"unknown {name}", got=getattr(self, name), remedy=remedy)


class Spec(NamedTuple):
    """Shape, logical axes (see sharding.RULES) and initial standard deviation of a weight."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    scale: float | None  # 0 means all ones, None all zeros


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
            q_bias=Spec((n, qh), ("layer", "heads"), 0.1) if config.qkv_bias else None,
            k_bias=Spec((n, gh), ("layer", "kv_heads"), 0.1) if config.qkv_bias else None,
            v_bias=Spec((n, gh), ("layer", "kv_heads"), 1e-3) if config.qkv_bias else None,
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
    return jax.tree.unflatten(tree, [_draw(spec, key) for spec, key in zip(leaves, keys, strict=True)])


def _draw(spec: Spec, key: Array) -> Array:
    if not spec.scale:
        return jnp.zeros(spec.shape) if spec.scale is None else jnp.ones(spec.shape)
    return spec.scale * jax.random.truncated_normal(key, -3, 3, spec.shape)


def prefix_forward(weights: Decoder, config: DecoderConfig, prompt: Array, prompt_mask: Array) -> Prefix:
    """One causal pass over left-padded prompts.

    Args: prompt int32 [B, P]; prompt_mask bool [B, P], whose last column is real.
    Returns: the keys and values of tokens 0 .. P - 2; the last prompt token is each branch's first token.
    """
    position = jnp.cumsum(prompt_mask, axis=1) - 1
    mask, tokens, angles = prompt_mask[:, :-1], prompt[:, :-1], angles_at(config, position[:, :-1])
    causal = jnp.tril(jnp.ones((tokens.shape[1],) * 2, bool))
    visible = (causal & mask[:, None, :])[:, None]  # [B, 1, T, T]

    def step(x: Array, layer: Layer) -> tuple[Array, tuple[Array, Array]]:
        q, k, v = qkv(layer, config, x, angles)
        attended = attend(q, [Keys(k, v, visible)])
        return residual(layer, config, x, attended), (k, v)

    x = embed(weights, config, tokens)
    _, (k, v) = jax.lax.scan(rematted(step, config), x, weights.layers)
    return Prefix(k, v, mask, position[:, -1])


def branch_forward(weights: Decoder, config: DecoderConfig, prefix: Prefix, tokens: Array, mask: Array) -> Array:
    """K continuations of each prompt in one pass.

    Args: tokens int32 [B, K, A], the first of which is the prompt's last token; mask bool [B, K, A], right-padded.
    Returns: the normalised last hidden states [B, K, A, D]; position j is the distribution of token j + 1.
    """
    b, k_, a = tokens.shape
    position = prefix.start[:, None, None] + jnp.arange(a)
    angles = angles_at(config, jnp.broadcast_to(position, (b, k_, a)).reshape(b * k_, a))
    own = jnp.tril(jnp.ones((a, a), bool)) & mask.reshape(b * k_, 1, 1, a)
    shared = prefix.mask[:, None, None]  # [B, 1, 1, P - 1]

    def step(x: Array, inputs: tuple[Layer, Array, Array]) -> tuple[Array, None]:
        layer, prefix_k, prefix_v = inputs
        q, k, v = qkv(layer, config, x, angles)
        attended = attend(q, [Keys(prefix_k, prefix_v, shared), Keys(k, v, own)])
        return residual(layer, config, x, attended), None

    x = embed(weights, config, tokens.reshape(b * k_, a))
    x, _ = jax.lax.scan(rematted(step, config), x, (weights.layers, prefix.k, prefix.v))
    return rms_norm(x, weights.final_norm, config.norm_eps).reshape(b, k_, a, config.model)


def decode_step(
    weights: Decoder, config: DecoderConfig, prefix: Prefix, cache: tuple[Array, Array], slot: Array, token: Array
) -> tuple[Array, tuple[Array, Array]]:
    """One more token of K branches of each prompt.

    Args: cache: keys and values [N, B, G, K, S, H] of the branch tokens so far; slot: how many there are;
      token int32 [B, K], which goes into that slot.
    Returns: the hidden states [B, K, D] and the cache with the slot filled.
    """
    b, k_ = token.shape
    slots = cache[0].shape[4]
    position = jnp.repeat(prefix.start + slot, k_)[:, None]
    angles = angles_at(config, position)
    # All branches of a prompt go through one product with the keys of all; each sees its own. That wastes a factor
    # K of a small product, and saves B * K tiny ones.
    own = jnp.eye(k_, dtype=bool)[:, :, None] & (jnp.arange(slots) < slot)
    past = jnp.tile(own.reshape(k_, 1, 1, k_ * slots), (b, 1, 1, 1))  # [B * K, 1, 1, K * S]
    shared, itself = prefix.mask[:, None, None], jnp.ones((1, 1, 1, 1), bool)

    def flat(x: Array) -> Array:
        return x.reshape(*x.shape[:2], k_ * slots, config.head_dim)

    def step(x: Array, inputs: tuple) -> tuple[Array, tuple[Array, Array]]:
        layer, prefix_k, prefix_v, past_k, past_v = inputs
        q, k, v = qkv(layer, config, x, angles)
        before = [Keys(prefix_k, prefix_v, shared), Keys(flat(past_k), flat(past_v), past)]
        attended = attend(q, [*before, Keys(k, v, itself)])
        return residual(layer, config, x, attended), (k, v)

    x = embed(weights, config, token.reshape(b * k_, 1))
    x, now = jax.lax.scan(step, x, (weights.layers, prefix.k, prefix.v, *cache))

    # After the scan, so that a loop around this function updates one slot in place and copies no cache.
    def put(cached: Array, new: Array) -> Array:
        new = new.reshape(config.layers, b, k_, config.kv_heads, 1, config.head_dim).swapaxes(2, 3)
        return jax.lax.dynamic_update_slice_in_dim(cached, new, slot, axis=4)

    hidden = rms_norm(x, weights.final_norm, config.norm_eps).reshape(b, k_, config.model)
    return hidden, (put(cache[0], now[0]), put(cache[1], now[1]))


def empty_cache(config: DecoderConfig, prefix: Prefix, candidates: int, slots: int) -> tuple[Array, Array]:
    """A cache for `slots` branch tokens of `candidates` branches of each prompt: two of [N, B, G, K, S, H]."""
    n, b, g, _, h = prefix.k.shape
    zeros = jnp.zeros((n, b, g, candidates, slots, h), prefix.k.dtype)
    return zeros, zeros


def unembedding(weights: Decoder) -> Array:
    """The matrix [D, V] from hidden states to logits."""
    return weights.embed.T if weights.unembed is None else weights.unembed


def rms_norm(x: Array, gain: Array, eps: float) -> Array:
    """x / rms(x) * gain over the last axis, in float32."""
    wide = x.astype(jnp.float32)
    scaled = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (scaled * gain).astype(x.dtype)


def embed(weights: Decoder, config: DecoderConfig, tokens: Array) -> Array:
    """The first hidden states [X, T, D] of tokens [X, T]."""
    # Rows are drawn with standard deviation D^-0.5 (right for the tied logits); D^0.5 makes them unit inputs.
    return weights.embed[tokens].astype(config.dtype) * config.model**0.5


def angles_at(config: DecoderConfig, position: Array) -> tuple[Array, Array]:
    """The rotary angles of positions [X, T]."""
    return rotary(position, config.head_dim, config.rope_theta)


def qkv(layer: Layer, config: DecoderConfig, x: Array, angles: tuple[Array, Array]) -> tuple[Array, Array, Array]:
    """Queries [X, Q, T, H] and keys, values [X, G, T, H] of hidden states [X, T, D]."""
    x = rms_norm(x, layer.attention_norm, config.norm_eps)

    def heads(matrix: Array, bias: Array | None, count: int) -> Array:
        y = matmul(x, matrix)
        y = y if bias is None else y + bias.astype(y.dtype)
        return y.reshape(*x.shape[:2], count, config.head_dim).swapaxes(1, 2)

    q, k = heads(layer.q, layer.q_bias, config.query_heads), heads(layer.k, layer.k_bias, config.kv_heads)
    return turn(q, angles), turn(k, angles), heads(layer.v, layer.v_bias, config.kv_heads)


def residual(layer: Layer, config: DecoderConfig, x: Array, attended: Array) -> Array:
    """What is left of a layer after attention [X, T, Q * H]: its output product and the feed-forward block."""
    x = x + matmul(attended, layer.o)
    y = rms_norm(x, layer.mlp_norm, config.norm_eps)
    return x + matmul(jax.nn.silu(matmul(y, layer.gate)) * matmul(y, layer.up), layer.down)


def rematted(step: Callable, config: DecoderConfig) -> Callable:
    """A layer's step under the configuration's rematerialisation."""
    policy = REMAT[config.remat]
    return step if policy is None else jax.checkpoint(step, policy=policy)
