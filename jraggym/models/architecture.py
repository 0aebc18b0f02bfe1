"""What a decoder is made of: its configuration, and the table of its weights.

Letters: D model, Q query heads, G key/value heads, H head dim, F feed-forward, V vocabulary, N layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from jraggym.errors import InputError

REMAT = {
    "none": None,  # keep every activation
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # keep products with weights, recompute the rest
    "layer": jax.checkpoint_policies.nothing_saveable,  # keep each layer's input only
}
ATTENTION = ("xla", "splash", "cudnn")
ACTIVATIONS = ("silu", "gelu_tanh")
SCALINGS = ("none", "linear", "llama3")
RUNTIME = ("dtype", "remat", "attention")  # fields of DecoderConfig about computing, not about the model


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Slower rotations, for texts longer than those of the first training.

    "linear" divides all frequencies by `factor`; "llama3" those that turn fewer than `low` times over `original`
    positions, and leaves those that turn more than `high` times, with a ramp between.
    """

    kind: str = "none"
    factor: float = 1.0
    low: float = 1.0
    high: float = 4.0
    original: int = 8192

    def __post_init__(self) -> None:
        _one_of(self, "kind", SCALINGS)
        if not (self.factor > 0 and self.low < self.high and self.original >= 1):  # NaN is none of them
            remedy = "factor > 0, low < high and original >= 1 are needed."
            raise InputError("impossible rope_scaling", got=self, remedy=remedy)


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
    # what else families differ in, see models/families.py
    activation: str = "silu"  # of the feed-forward block's gate
    o_bias: bool = False  # of attention's output, beside qkv_bias (Llama's attention_bias)
    qk_norm: bool = False  # each head's queries and keys are normalised before they are turned
    post_norms: bool = False  # what attention and feed-forward write is normalised too
    gain_offset: bool = False  # gains are kept as w and act as 1 + w
    scale_embed: bool = True  # hidden states begin as sqrt(D) times the embedding
    query_scalar: float | None = None  # scores are divided by its square root; None: head_dim
    score_cap: float | None = None  # a score s becomes cap * tanh(s / cap)
    final_cap: float | None = None  # so does a logit
    window: int | None = None  # a local layer's token sees this many, itself included
    local: tuple[bool, ...] | None = None  # which layers are local; None: all, where there is a window
    local_rope_theta: float | None = None  # of local layers, without rope_scaling; None: they turn as the others
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)

    def __post_init__(self) -> None:
        if isinstance(self.rope_scaling, Mapping):  # from JSON
            object.__setattr__(self, "rope_scaling", RopeScaling(**self.rope_scaling))
        if self.local is not None:
            object.__setattr__(self, "local", tuple(self.local))
        if self.query_heads % self.kv_heads:
            raise InputError(
                "query_heads must be a multiple of kv_heads",
                got=f"{self.query_heads} and {self.kv_heads}",
                remedy="Change one of them.",
            )
        if self.head_dim < 1 or self.head_dim % 2:
            raise InputError(
                "head_dim must be even and positive", got=self.head_dim, remedy="Rotary positions turn pairs."
            )
        for name, known in (("remat", tuple(REMAT)), ("attention", ATTENTION), ("activation", ACTIVATIONS)):
            _one_of(self, name, known)
        for name in ("query_scalar", "score_cap", "final_cap", "window", "local_rope_theta"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(f"{name} must be positive", got=value, remedy="None leaves it out.")
        for name in ("rope_theta", "norm_eps"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} must be positive", got=getattr(self, name), remedy="Is the record whole?")
        self._check_local()

    def _check_local(self) -> None:
        if self.window is None and (self.local is not None or self.local_rope_theta is not None):
            got = f"local={self.local}, local_rope_theta={self.local_rope_theta}"
            raise InputError("local layers need a window", got=got, remedy="Set window.")
        if self.local is not None and (len(self.local) != self.layers or len(set(self.local)) != 2):
            remedy = "Say True or False for each layer; None where all are local, no window where none is."
            raise InputError(f"local must tell {self.layers} layers apart", got=self.local, remedy=remedy)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The window of all layers, or where they differ that of global ones (None) and that of local ones."""
        return (self.window,) if self.local is None else (None, self.window)

    @property
    def score_scale(self) -> float:
        """What products of queries and keys are multiplied by."""
        return (self.query_scalar or self.head_dim) ** -0.5


def _one_of(record: Any, name: str, known: tuple[str, ...]) -> None:
    if getattr(record, name) not in known:
        raise InputError(f"unknown {name}", got=getattr(record, name), remedy=f"Use one of {', '.join(known)}.")


class Spec(NamedTuple):
    """Shape, logical axes (see sharding.RULES) and initial standard deviation of a weight."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    scale: float | None  # 0 means all ones, None all zeros


@struct.dataclass
class Layer:
    """The weights of all N layers, stacked; None where a configuration does without."""

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
    q_norm: Any = None  # [N, H] or None
    k_norm: Any = None  # [N, H] or None
    attention_post_norm: Any = None  # [N, D] or None
    mlp_post_norm: Any = None  # [N, D] or None
    o_bias: Any = None  # [N, D] or None


@struct.dataclass
class Decoder:
    """The trunk's weights; `unembed` is None when tied to `embed`."""

    embed: Any  # [V, D]
    layers: Layer
    final_norm: Any  # [D]
    unembed: Any  # [D, V] or None


def specs(config: DecoderConfig) -> Decoder:
    """The one table of the decoder's weights, as a tree of `Spec`."""
    n, d, f = config.layers, config.model, config.feed_forward
    qh, gh = config.query_heads * config.head_dim, config.kv_heads * config.head_dim
    inner, outer = d**-0.5, (2 * n) ** -0.5  # the usual depth scaling of residual writes
    unit = None if config.gain_offset else 0.0  # the gain of 1

    def gain(width: int, there: bool = True) -> Spec | None:
        return Spec((n, width), ("layer", None), unit) if there else None

    return Decoder(
        embed=Spec((config.vocab, d), ("vocab", "model"), d**-0.5),
        layers=Layer(
            attention_norm=gain(d),
            q=Spec((n, d, qh), ("layer", "model", "heads"), inner),
            k=Spec((n, d, gh), ("layer", "model", "kv_heads"), inner),
            v=Spec((n, d, gh), ("layer", "model", "kv_heads"), inner),
            q_bias=Spec((n, qh), ("layer", "heads"), 0.1) if config.qkv_bias else None,
            k_bias=Spec((n, gh), ("layer", "kv_heads"), 0.1) if config.qkv_bias else None,
            v_bias=Spec((n, gh), ("layer", "kv_heads"), 1e-3) if config.qkv_bias else None,
            o=Spec((n, qh, d), ("layer", "heads", "model"), outer * qh**-0.5),
            mlp_norm=gain(d),
            gate=Spec((n, d, f), ("layer", "model", "feed_forward"), inner),
            up=Spec((n, d, f), ("layer", "model", "feed_forward"), inner),
            down=Spec((n, f, d), ("layer", "feed_forward", "model"), outer * f**-0.5),
            q_norm=gain(config.head_dim, config.qk_norm),
            k_norm=gain(config.head_dim, config.qk_norm),
            attention_post_norm=gain(d, config.post_norms),
            mlp_post_norm=gain(d, config.post_norms),
            o_bias=Spec((n, d), ("layer", None), None) if config.o_bias else None,
        ),
        final_norm=Spec((d,), (None,), unit),
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
