"""LoRA: small trainable pairs beside a frozen decoder, which is at the same time the reference policy.

    table    = lora_specs(config, lora)            what is trained
    adapters = init(table, key)
    policy   = adapt(base, adapters, lora)         a Decoder like any other; its gradient goes to the adapters
    served   = merge(base, adapters, lora)         plain weights

The base matrices are never copied: a product with W + scale * A B is x W + scale * (x A) B.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jraggym.errors import InputError
from jraggym.models.decoder import Decoder, DecoderConfig, Spec, specs
from jraggym.models.linear import LowRank

Adapters = dict[str, dict[str, Any]]  # {"q": {"a": [N, D, R], "b": [N, R, Q * H]}, ...}


@dataclass(frozen=True, slots=True)
class Lora:
    """Which matrices of a layer get an update, and how large it may be."""

    rank: int = 16  # 0: no adapters, where a configuration has to say so
    alpha: float = 32.0  # the update is alpha / rank * A B
    dropout: float = 0.0
    leaves: tuple[str, ...] = ("q", "k", "v", "o")

    def __post_init__(self) -> None:
        if self.rank < 0 or not 0 <= self.dropout < 1:
            raise InputError("LoRA: rank >= 0 and 0 <= dropout < 1", got=self, remedy="Change them.")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def lora_specs(config: DecoderConfig, lora: Lora) -> Adapters:
    """The weight table of the adapters: A as in PEFT of standard deviation (3 in)^-1/2, B zero.

    Raises InputError for a rank of 0 and for a leaf that is no matrix of a layer.
    """
    if not lora.rank:
        raise InputError("adapters of rank 0", got=lora, remedy="Raise the rank, or train all weights.")
    layers = vars(specs(config).layers)
    matrices = {name: spec for name, spec in layers.items() if spec is not None and len(spec.shape) == 3}
    if unknown := [name for name in lora.leaves if name not in matrices]:
        raise InputError("LoRA on no matrix", got=", ".join(unknown), remedy=f"Use some of {', '.join(matrices)}.")

    def pair(spec: Spec) -> dict[str, Spec]:
        (n, width, out), (layer, inner, outer) = spec.shape, spec.axes
        a = Spec((n, width, lora.rank), (layer, inner, None), (3 * width) ** -0.5)
        return {"a": a, "b": Spec((n, lora.rank, out), (layer, None, outer), None)}

    return {name: pair(matrices[name]) for name in lora.leaves}


def adapt(base: Decoder, adapters: Adapters, lora: Lora, key: Array | None = None) -> Decoder:
    """The base with its adapters; gradients reach the adapters alone. With a key, dropout is on."""
    base = jax.lax.stop_gradient(base)

    def leaf(number: int, name: str) -> LowRank:
        matrix, pair = getattr(base.layers, name), adapters[name]
        keys = None
        if key is not None and lora.dropout:
            keys = jax.random.split(jax.random.fold_in(key, number), matrix.shape[0])
        return LowRank(matrix, pair["a"], pair["b"], lora.scale, lora.dropout, keys)

    return replace(base, layers=replace(base.layers, **{name: leaf(i, name) for i, name in enumerate(lora.leaves)}))


def merge(base: Decoder, adapters: Adapters, lora: Lora) -> Decoder:
    """Plain weights that act as `adapt(base, adapters, lora)`."""

    def leaf(name: str) -> Array:
        matrix, pair = getattr(base.layers, name), adapters[name]
        return (matrix + lora.scale * jnp.einsum("nir,nro->nio", pair["a"], pair["b"])).astype(matrix.dtype)

    return replace(base, layers=replace(base.layers, **{name: leaf(name) for name in lora.leaves}))
