"""The decoder (RMSNorm, rotary positions, grouped-query attention, SwiGLU) as pure functions over typed weights.

Two functions carry training and inference alike:

    prefix_forward   one causal pass over the prompts                     -> keys and values of every layer
    branch_forward   K continuations of each prompt, attending to the prompt's keys and to their own

so a prompt is computed once however many candidates branch from it. Layers run under one scan. Where a configuration
has local and global layers, what differs between them (masks and rotary angles) is a pair, and each layer takes its
own by a scanned switch; where all layers are alike there is neither pair nor switch.

Letters: B batch, P prompt tokens, K candidates, A branch tokens, S cache slots, D model, Q query heads,
G key/value heads, H head dim, F feed-forward, V vocabulary, N layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array
from jax.sharding import Mesh

from jraggym.models.architecture import REMAT, Decoder, DecoderConfig, Layer, RopeScaling, Spec, init, is_spec, specs
from jraggym.models.attention import Keys, attend, attend_back, frequencies, rotary, turn
from jraggym.models.linear import matmul
from jraggym.sharding import keep_rows

__all__ = [
    "Decoder",
    "DecoderConfig",
    "Layer",
    "Prefix",
    "RopeScaling",
    "Spec",
    "angles_at",
    "branch_forward",
    "decode_step",
    "embed",
    "empty_cache",
    "init",
    "is_spec",
    "local_layers",
    "of_layer",
    "prefix_forward",
    "qkv",
    "rematted",
    "residual",
    "rms_norm",
    "specs",
    "unembedding",
]


@struct.dataclass
class Prefix:
    """Keys and values of the prompt tokens that branches attend to (all but the last one of each prompt)."""

    k: Array  # [N, B, G, P - 1, H]
    v: Array  # [N, B, G, P - 1, H]
    mask: Array  # bool [B, P - 1]
    start: Array  # int32 [B]  position of the last prompt token, where every branch begins


def prefix_forward(
    weights: Decoder, config: DecoderConfig, prompt: Array, prompt_mask: Array, mesh: Mesh | None = None
) -> Prefix:
    """One causal pass over left-padded prompts.

    Args: prompt int32 [B, P]; prompt_mask bool [B, P], whose last column is real; mesh: where the rows are kept apart.
    Returns: the keys and values of tokens 0 .. P - 2; the last prompt token is each branch's first token.
    """
    position = jnp.cumsum(prompt_mask, axis=1) - 1
    mask, tokens, angles = prompt_mask[:, :-1], prompt[:, :-1], angles_at(config, position[:, :-1])
    causal = jnp.tril(jnp.ones((tokens.shape[1],) * 2, bool))
    visible = seen(config, (causal & mask[:, None, :])[:, None], _behind(position[:, :-1], position[:, :-1])[:, None])

    def step(x: Array, inputs: tuple[Layer, Array | None, Array]) -> tuple[Array, tuple[Array, Array]]:
        layer, local, last = inputs
        x = keep_rows(x, mesh)
        q, k, v = qkv(layer, config, x, of_layer(angles, local))

        def rest(x: Array) -> Array:
            own = Keys(k, v, of_layer(visible, local))
            return residual(layer, config, x, attend_back(q, own, config.score_scale, config.score_cap))

        # Of the last layer nothing but keys and values is read. Training on a mesh computes the rest of it all the
        # same: within a branch, weights could not be gathered ahead.
        return (jax.lax.cond(last, lambda x: x, rest, x) if mesh is None else rest(x)), (k, v)

    x = embed(weights, config, tokens)
    last = jnp.arange(config.layers) == config.layers - 1
    _, (k, v) = jax.lax.scan(rematted(step, config), x, (weights.layers, local_layers(config), last))
    return Prefix(k, v, mask, position[:, -1])


def branch_forward(
    weights: Decoder, config: DecoderConfig, prefix: Prefix, tokens: Array, mask: Array, mesh: Mesh | None = None
) -> Array:
    """K continuations of each prompt in one pass.

    Args: tokens int32 [B, K, A], the first of which is the prompt's last token; mask bool [B, K, A], right-padded;
      mesh: where the rows are kept apart.
    Returns: the normalised last hidden states [B, K, A, D]; position j is the distribution of token j + 1.
    """
    b, k_, a = tokens.shape
    position = prefix.start[:, None, None] + jnp.arange(a)
    angles = angles_at(config, jnp.broadcast_to(position, (b, k_, a)).reshape(b * k_, a))
    causal = jnp.tril(jnp.ones((a, a), bool))
    own = seen(config, causal & mask.reshape(b * k_, 1, 1, a), _behind(jnp.arange(a), jnp.arange(a)))
    back = _behind(position[:, 0], _prefix_position(prefix))[:, None]
    shared = seen(config, prefix.mask[:, None, None], back)  # [B, 1, 1 or A, P - 1]

    def step(x: Array, inputs: tuple) -> tuple[Array, None]:
        layer, local, prefix_k, prefix_v = inputs
        x = keep_rows(x, mesh)
        q, k, v = qkv(layer, config, x, of_layer(angles, local))
        keys = [Keys(prefix_k, prefix_v, of_layer(shared, local)), Keys(k, v, of_layer(own, local))]
        return residual(layer, config, x, attend(q, keys, config.score_scale, config.score_cap)), None

    x = embed(weights, config, tokens.reshape(b * k_, a))
    x, _ = jax.lax.scan(rematted(step, config), x, (weights.layers, local_layers(config), prefix.k, prefix.v))
    return rms_norm(x, weights.final_norm, config).reshape(b, k_, a, config.model)


def decode_step(
    weights: Decoder, config: DecoderConfig, prefix: Prefix, cache: tuple[Array, Array], slot: Array, token: Array
) -> tuple[Array, tuple[Array, Array]]:
    """One more token of K branches of each prompt.

    Args: cache: keys and values [N, B * K, G, S, H] of the branch tokens so far; slot: how many there are;
      token int32 [B, K], which goes into that slot.
    Returns: the hidden states [B, K, D] and the cache with the slot filled.
    """
    b, k_ = token.shape
    slots = cache[0].shape[3]
    angles = angles_at(config, jnp.repeat(prefix.start + slot, k_)[:, None])
    back = (prefix.start + slot)[:, None] - _prefix_position(prefix)
    shared = seen(config, prefix.mask[:, None, None], back[:, None, None])
    past = seen(config, (jnp.arange(slots) < slot)[None, None, None], slot - jnp.arange(slots))
    itself = jnp.ones((1, 1, 1, 1), bool)

    def step(x: Array, inputs: tuple) -> tuple[Array, tuple[Array, Array]]:
        layer, local, prefix_k, prefix_v, past_k, past_v = inputs
        q, k, v = qkv(layer, config, x, of_layer(angles, local))
        before = [Keys(prefix_k, prefix_v, of_layer(shared, local)), Keys(past_k, past_v, of_layer(past, local))]
        attended = attend(q, [*before, Keys(k, v, itself)], config.score_scale, config.score_cap)
        return residual(layer, config, x, attended), (k, v)

    x = embed(weights, config, token.reshape(b * k_, 1))
    x, now = jax.lax.scan(step, x, (weights.layers, local_layers(config), prefix.k, prefix.v, *cache))

    # After the scan, so that a loop around this function updates one slot in place and copies no cache.
    def put(cached: Array, new: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(cached, new, slot, axis=3)

    hidden = rms_norm(x, weights.final_norm, config).reshape(b, k_, config.model)
    return hidden, (put(cache[0], now[0]), put(cache[1], now[1]))


def empty_cache(config: DecoderConfig, prefix: Prefix, candidates: int, slots: int) -> tuple[Array, Array]:
    """A cache for `slots` branch tokens of `candidates` branches of each prompt: two of [N, B * K, G, S, H]."""
    n, b, g, _, h = prefix.k.shape
    zeros = jnp.zeros((n, b * candidates, g, slots, h), prefix.k.dtype)
    return zeros, zeros


def unembedding(weights: Decoder) -> Array:
    """The matrix [D, V] from hidden states to logits."""
    return weights.embed.T if weights.unembed is None else weights.unembed


def local_layers(config: DecoderConfig) -> Array | None:
    """Which layers are local, bool [N] to scan over; None where all are alike."""
    return None if config.local is None else jnp.array(config.local)


def of_layer(values: tuple, local: Array | None) -> Any:
    """A layer's value out of those of (all layers,) or of (global, local) layers."""
    return values[0] if local is None else jax.tree.map(lambda far, near: jnp.where(local, near, far), *values)


def seen(config: DecoderConfig, visible: Array, back: Array) -> tuple[Array, ...]:
    """What is visible within the window of (all layers,) or of (global, local) ones.

    Args: visible bool; back int32, broadcasts with it: how many positions a key is behind its query.
    """
    return tuple(visible if window is None else visible & (back < window) for window in config.windows)


def angles_at(config: DecoderConfig, position: Array) -> tuple[tuple[Array, Array], ...]:
    """The rotary angles of positions [X, T], in (all layers,) or in (global, local) ones."""
    far = frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    near = far if config.local_rope_theta is None else frequencies(config.head_dim, config.local_rope_theta)
    return tuple(rotary(position, far if window is None else near) for window in config.windows)


def _behind(query: Array, key: Array) -> Array:
    """How many positions each key [..., S] is behind each query [..., T]: [..., T, S]."""
    return query[..., :, None] - key[..., None, :]


def _prefix_position(prefix: Prefix) -> Array:
    """The positions [B, P - 1] of a prefix's tokens."""
    return jnp.cumsum(prefix.mask, axis=1) - 1


def rms_norm(x: Array, gain: Array, config: DecoderConfig) -> Array:
    """x / rms(x) * gain over the last axis, in float32."""
    wide = x.astype(jnp.float32)
    scaled = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + config.norm_eps)
    return (scaled * (1.0 + gain if config.gain_offset else gain)).astype(x.dtype)


def embed(weights: Decoder, config: DecoderConfig, tokens: Array) -> Array:
    """The first hidden states [X, T, D] of tokens [X, T]."""
    x = weights.embed[tokens].astype(config.dtype)
    # Rows are drawn with standard deviation D^-0.5 (right for the tied logits); D^0.5 makes them unit inputs.
    return x * config.model**0.5 if config.scale_embed else x


def qkv(layer: Layer, config: DecoderConfig, x: Array, angles: tuple[Array, Array]) -> tuple[Array, Array, Array]:
    """Queries [X, Q, T, H] and keys, values [X, G, T, H] of hidden states [X, T, D]."""
    x = rms_norm(x, layer.attention_norm, config)

    def heads(matrix: Array, bias: Array | None, count: int) -> Array:
        y = matmul(x, matrix)
        y = y if bias is None else y + bias.astype(y.dtype)
        return y.reshape(*x.shape[:2], count, config.head_dim).swapaxes(1, 2)

    q, k = heads(layer.q, layer.q_bias, config.query_heads), heads(layer.k, layer.k_bias, config.kv_heads)
    if config.qk_norm:
        q, k = rms_norm(q, layer.q_norm, config), rms_norm(k, layer.k_norm, config)
    return turn(q, angles), turn(k, angles), heads(layer.v, layer.v_bias, config.kv_heads)


def residual(layer: Layer, config: DecoderConfig, x: Array, attended: Array) -> Array:
    """What is left of a layer after attention [X, T, Q * H]: its output product and the feed-forward block."""

    def written(y: Array, gain: Array) -> Array:
        return rms_norm(y, gain, config) if config.post_norms else y

    y = matmul(attended, layer.o)
    y = y if layer.o_bias is None else y + layer.o_bias.astype(y.dtype)
    x = x + written(y, layer.attention_post_norm)
    y = rms_norm(x, layer.mlp_norm, config)
    gate = jax.nn.silu if config.activation == "silu" else jax.nn.gelu  # gelu: its tanh approximation
    return x + written(matmul(gate(matmul(y, layer.gate)) * matmul(y, layer.up), layer.down), layer.mlp_post_norm)


def rematted(step: Callable, config: DecoderConfig) -> Callable:
    """A layer's step under the configuration's rematerialisation."""
    policy = REMAT[config.remat]
    return step if policy is None else jax.checkpoint(step, policy=policy)
