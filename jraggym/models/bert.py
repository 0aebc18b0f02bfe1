"""The network of BERT (Devlin et al. 2019): weights as records of arrays, the forward pass as a pure function.

The layers run under one scan, and every product with a weight matrix is flat, which XLA's CPU backend runs fastest.
Letters: Q texts, T tokens, D model width, F feed-forward width, H heads, V vocabulary, N layers.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array
from safetensors import SafetensorError, safe_open

from jraggym.errors import InputError
from jraggym.models.encoders import Family
from jraggym.models.linear import matmul


@struct.dataclass
class Affine:
    """Weight and bias of a linear map, or scale and shift of a layer normalisation."""

    weight: Array  # f32 [N, in, out] of a linear map, [N, D] of a normalisation; no N outside the layers
    bias: Array  # f32 [N, out]


@struct.dataclass
class Layers:
    """All N layers, stacked on the leading axis."""

    qkv: Affine  # D -> 3 D: query, key and value side by side
    out: Affine  # D -> D
    attention_norm: Affine
    up: Affine  # D -> F
    down: Affine  # F -> D
    output_norm: Affine


@struct.dataclass
class Bert:
    """The weights of the encoder."""

    word: Array  # f32 [V, D]
    position: Array  # f32 [positions, D]
    kind: Array  # f32 [types, D]: the first and, in a pair, the second segment
    norm: Affine
    layers: Layers
    pooler: Affine | None = None  # unused here; kept where a file has it, so that an export has it too


@dataclass(frozen=True)
class BertConfig:
    """The fields of config.json that set shapes and numbers."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int
    layer_norm_eps: float


# What this forward pass does; a config that asks for anything else is refused by name.
SUPPORTED: dict[str, Any] = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
}
_UNUSED = "embeddings.position_ids"
_TABLE = {
    "word": "embeddings.word_embeddings.weight",
    "position": "embeddings.position_embeddings.weight",
    "kind": "embeddings.token_type_embeddings.weight",
}
_NORM, _POOLER = "embeddings.LayerNorm", "pooler.dense"
_QKV = ("attention.self.query", "attention.self.key", "attention.self.value")
_LINEAR = {"out": "attention.output.dense", "up": "intermediate.dense", "down": "output.dense"}
_NORMS = {"attention_norm": "attention.output.LayerNorm", "output_norm": "output.LayerNorm"}


def token_states(params: Bert, config: BertConfig, ids: Array, mask: Array, frozen: int = 0) -> Array:
    """Gives the last layer's state of every token, f32 [Q, T, D], for ids int32 [Q, T].

    Args:
      mask: bool [Q, T], or int8 [Q, T] with the segment of each token, 1 or 2; False or 0 is padding.
      frozen: no gradient reaches the embeddings and this many of the first layers, nor is one computed; 0: all learn.
    """
    q, t = ids.shape
    kind = params.kind[0] if mask.dtype == bool else params.kind[jnp.maximum(mask.astype(jnp.int32) - 1, 0)]
    x = (params.word[ids] + params.position[:t] + kind).reshape(q * t, -1)
    x = _normalise(params.norm, x, config.layer_norm_eps)
    # Finite: a row without any token then attends evenly to its padding.
    bias = jnp.where(mask > 0, 0.0, jnp.finfo(jnp.float32).min)[:, None, None, :]

    def step(x: Array, layer: Layers) -> tuple[Array, None]:
        attended = _attend(_dense(layer.qkv, x).reshape(q, t, 3, config.num_attention_heads, -1), bias)
        x = _normalise(layer.attention_norm, x + _dense(layer.out, attended.reshape(x.shape)), config.layer_norm_eps)
        hidden = jax.nn.gelu(_dense(layer.up, x), approximate=False)
        return _normalise(layer.output_norm, x + _dense(layer.down, hidden), config.layer_norm_eps), None

    lower, upper = (jax.tree.map(lambda leaf, part=part: leaf[part], params.layers) for part in _parts(frozen))
    if frozen:
        x = jax.lax.stop_gradient(jax.lax.scan(step, x, lower)[0])
    return jax.lax.scan(step, x, upper)[0].reshape(q, t, -1)


def _parts(frozen: int) -> tuple[slice, slice]:
    return slice(frozen), slice(frozen, None)


def _attend(qkv: Array, bias: Array) -> Array:
    """f32 [Q, T, H, D / H] of the heads' queries, keys and values, f32 [Q, T, 3, H, D / H]."""
    # Heads before tokens: plain batched matrix products, a third faster on CPU than one einsum.
    q, k, v = qkv.transpose(2, 0, 3, 1, 4)
    weights = jax.nn.softmax(q @ k.swapaxes(2, 3) / float(np.sqrt(q.shape[-1])) + bias, axis=-1)
    return (weights @ v).swapaxes(1, 2)


def _dense(dense: Affine, x: Array) -> Array:
    return matmul(x, dense.weight) + dense.bias


def _normalise(norm: Affine, x: Array, eps: float) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(x.var(-1, keepdims=True) + eps) * norm.weight + norm.bias


def pooled(states: Array, mask: Array, family: Family) -> Array:
    """One vector f32 [Q, D] of each text's token states f32 [Q, T, D]; zero for a text without tokens."""
    real = (mask > 0).astype(states.dtype)
    if family.pooling == "cls":
        vectors = states[:, 0] * real[:, :1]
    else:
        vectors = jnp.einsum("qtd,qt->qd", states, real) / jnp.maximum(real.sum(1, keepdims=True), 1)
    if family.similarity != "cosine":
        return vectors
    length = jnp.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / jnp.where(length > 0, length, 1)


# ---------------------------------------------------------------- files


def read_config(path: Path) -> BertConfig:
    """Reads config.json; raises InputError for a missing field and, by name, for what is not supported."""
    values = read_json(path)
    config = BertConfig(*take(path, values, *(f.name for f in dataclasses.fields(BertConfig))))
    require(path, {"model_type": None} | values, SUPPORTED)
    return config


def load_weights(path: Path, config: BertConfig) -> Bert:
    """Reads every tensor of a safetensors file as f32; raises InputError listing the names that do not fit."""
    expected = _expected(config)
    d = config.hidden_size
    pooler = {f"{_POOLER}.weight": (d, d), f"{_POOLER}.bias": (d,)}
    try:
        with safe_open(path, framework="np") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            if any(name in shapes for name in pooler):
                expected |= pooler
            _check_names(path, expected, shapes)
            tensors = {name: file.get_tensor(name).astype(np.float32, copy=False) for name in expected}
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot read {path}", got=error, remedy="Give a folder with model.safetensors.") from error
    return _assemble(tensors, config.num_hidden_layers)


def tensors_of(params: Bert) -> dict[str, np.ndarray]:
    """The inverse of `load_weights`: every weight under its published name and in its published layout."""
    tensors = {name: np.asarray(getattr(params, field)) for field, name in _TABLE.items()}
    singles = [(_NORM, params.norm, False)] + ([(_POOLER, params.pooler, True)] if params.pooler is not None else [])
    layers = jax.tree.map(np.asarray, params.layers)
    for n in range(len(layers.qkv.bias)):
        layer = jax.tree.map(lambda stacked, n=n: stacked[n], layers)
        thirds = zip(np.split(layer.qkv.weight, 3, axis=1), np.split(layer.qkv.bias, 3), strict=True)
        named = [(name, Affine(*map(jnp.asarray, third)), True) for name, third in zip(_QKV, thirds, strict=True)]
        named += [(name, getattr(layer, field), True) for field, name in _LINEAR.items()]
        named += [(name, getattr(layer, field), False) for field, name in _NORMS.items()]
        singles += [(f"encoder.layer.{n}.{name}", affine, linear) for name, affine, linear in named]
    for name, affine, linear in singles:
        weight = np.asarray(affine.weight)
        tensors[f"{name}.weight"] = np.ascontiguousarray(weight.T if linear else weight)
        tensors[f"{name}.bias"] = np.ascontiguousarray(affine.bias)
    return tensors


def _expected(config: BertConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that the forward pass uses."""
    d, f = config.hidden_size, config.intermediate_size
    tables = {"word": config.vocab_size, "position": config.max_position_embeddings, "kind": config.type_vocab_size}
    shapes: dict[str, tuple[int, ...]] = {_TABLE[field]: (rows, d) for field, rows in tables.items()}
    norms: dict[str, tuple[int, ...]] = dict.fromkeys((*_NORMS.values(),), (d,))
    layer = {**norms, **dict.fromkeys((*_QKV, _LINEAR["out"]), (d, d)), _LINEAR["up"]: (f, d), _LINEAR["down"]: (d, f)}
    places = {
        f"encoder.layer.{n}.{name}": shape for n in range(config.num_hidden_layers) for name, shape in layer.items()
    }
    for name, shape in ({_NORM: (d,)} | places).items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


def _check_names(path: Path, expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]) -> None:
    problems = [f"missing {name}" for name in expected if name not in found]
    problems += [f"unexpected {name}" for name in found if name not in expected and name != _UNUSED]
    problems += [f"{n} has shape {found[n]}, expected {s}" for n, s in expected.items() if found.get(n, s) != s]
    if problems:
        raise InputError(f"{path} does not fit", got="; ".join(problems), remedy="Use the file of this config.json.")


def _assemble(tensors: dict[str, np.ndarray], layers: int) -> Bert:
    def stack(name: str, kind: str) -> np.ndarray:
        arrays = [tensors[f"encoder.layer.{n}.{name}.{kind}"] for n in range(layers)]
        return np.stack([array.T if array.ndim == 2 else array for array in arrays])

    def linear(*names: str) -> Affine:
        weights, biases = ([stack(name, kind) for name in names] for kind in ("weight", "bias"))
        return Affine(jnp.asarray(np.concatenate(weights, -1)), jnp.asarray(np.concatenate(biases, -1)))

    def single(name: str) -> Affine:
        return Affine(jnp.asarray(tensors[f"{name}.weight"].T), jnp.asarray(tensors[f"{name}.bias"]))

    named = {field: linear(name) for field, name in (_LINEAR | _NORMS).items()}
    return Bert(
        **{field: jnp.asarray(tensors[name]) for field, name in _TABLE.items()},
        norm=single(_NORM),
        layers=Layers(qkv=linear(*_QKV), **named),
        pooler=single(_POOLER) if f"{_POOLER}.weight" in tensors else None,
    )


def read_json(path: Path) -> Any:
    """The JSON value of a file of a model folder; raises InputError when there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}", got=error, remedy="Give a complete model folder.") from error


def require(path: Path, values: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Refuses by name the first setting that is present and differs from the wanted one."""
    for name, value in wanted.items():
        if name in values and values[name] != value:
            remedy = f"Use a model with {name} = {value!r}."
            raise InputError(f"{path}: this {name} is not supported", got=repr(values[name]), remedy=remedy)


def take(path: Path, values: Any, *names: str) -> list[Any]:
    """Takes fields of a JSON object, which may be anything until it is checked here."""
    if missing := [name for name in names if not isinstance(values, dict) or name not in values]:
        raise InputError(f"{path}: missing field", got=", ".join(missing), remedy="Give a complete model folder.")
    return [values[name] for name in names]
