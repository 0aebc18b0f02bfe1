"""A critic that reads two texts at once, a question and a proposal: a BERT trunk with a scalar head.

It is `BertForSequenceClassification` with one label, so that an exported folder is served by `transformers` and by
sentence-transformers' `CrossEncoder`. Letters: X pairs, T tokens, D width.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from jraggym.models.bert import SUPPORTED, Affine, Bert, BertConfig, tensors_of, token_states
from jraggym.models.bert_encoder import SPECIAL, BertEncoder
from jraggym.whole import whole_folder

Pair = tuple[str, str]
WIDTHS = (32, 48, 64, 80, 96, 128, 192, 256)  # token counts padded to


@struct.dataclass
class BertCritic:
    """score = w . tanh(W h_first + b) + c, with the state h_first of the first token, as BERT's classifiers have it."""

    trunk: Bert  # with its pooler
    head: Affine  # D -> 1


def pair_scores(weights: BertCritic, config: BertConfig, ids: Array, kinds: Array, frozen: int = 0) -> Array:
    """Scores f32 [X] of pairs; ids int32 [X, T], kinds int8 [X, T]: 1 and 2 in the two texts, 0 for padding.

    `frozen` as in `token_states`.
    """
    pooler = weights.trunk.pooler
    assert pooler is not None
    first = token_states(weights.trunk, config, ids, kinds, frozen)[:, 0]
    return (jnp.tanh(first @ pooler.weight + pooler.bias) @ weights.head.weight + weights.head.bias)[:, 0]


def new_critic(encoder: BertEncoder, key: Array) -> BertCritic:
    """An untrained head on an encoder's trunk; the pooler is drawn anew, since sentence encoders do not use theirs."""
    trunk, width = encoder.query.params, encoder.query.dim
    pooler, head = jax.random.split(key)
    drawn = Affine(jax.random.normal(pooler, (width, width)) * width**-0.5, jnp.zeros(width))
    scalar = Affine(jax.random.normal(head, (width, 1)) * 0.02, jnp.zeros(1))
    return BertCritic(dataclasses.replace(trunk, pooler=drawn), scalar)


@dataclass(frozen=True)
class PairTokenizer:
    """Ids of pairs "[CLS] first [SEP] second [SEP]"; of a pair that is too long, the longer text loses its end."""

    tokenizer: Tokenizer
    limit: int = 96

    @classmethod
    def of(cls, encoder: BertEncoder, limit: int = 96) -> PairTokenizer:
        """The tokenizer of an encoder, with its own limit."""
        tokenizer = Tokenizer.from_str(encoder.query.tokenizer.to_str())
        tokenizer.no_padding()
        tokenizer.enable_truncation(limit, strategy="longest_first")
        return cls(tokenizer, limit)

    def __call__(self, pairs: Sequence[Pair], width: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Gives ids int32 [X, T] and kinds int8 [X, T], T = `width` or the smallest of WIDTHS that holds all."""
        rows = self.tokenizer.encode_batch_fast(list(pairs))
        longest = max((len(row.ids) for row in rows), default=1)
        width = width or next((w for w in WIDTHS if w >= longest), longest)
        ids, kinds = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width), np.int8)
        for i, row in enumerate(rows):
            ids[i, : len(row.ids)] = row.ids
            kinds[i, : len(row.ids)] = np.asarray(row.type_ids) + 1
        return ids, kinds


class PairScorer:
    """Scores pairs of texts in batches of similar length; each distinct pair is computed once."""

    def __init__(self, weights: BertCritic, config: BertConfig, tokenize: PairTokenizer, batch: int = 64):
        self._weights, self._tokenize, self._batch = weights, tokenize, batch
        self._apply = jax.jit(partial(pair_scores, config=config))
        self._known: dict[Pair, float] = {}

    def __call__(self, pairs: Sequence[Pair]) -> list[float]:
        """The score of each pair."""
        new = sorted({pair for pair in pairs if pair not in self._known}, key=lambda pair: (sum(map(len, pair)), pair))
        for start in range(0, len(new), self._batch):
            part = new[start : start + self._batch]
            filled = part + [("", "")] * (self._batch - len(part))
            ids, kinds = self._tokenize(filled)
            scores = np.asarray(self._apply(self._weights, ids=ids, kinds=kinds))
            self._known.update(zip(part, map(float, scores), strict=False))
        return [self._known[pair] for pair in pairs]


def save_bert_critic(folder: str | Path, weights: BertCritic, config: BertConfig, tokenize: PairTokenizer) -> None:
    """Writes a folder for `AutoModelForSequenceClassification` and `CrossEncoder`, whole or not at all.

    Raises InputError when the folder cannot be written.
    """
    tensors = {f"bert.{name}": tensor for name, tensor in tensors_of(weights.trunk).items()}
    tensors["classifier.weight"] = np.ascontiguousarray(np.asarray(weights.head.weight).T)
    tensors["classifier.bias"] = np.asarray(weights.head.bias)
    labels = {"id2label": {"0": "score"}, "label2id": {"score": 0}}
    values = {"architectures": ["BertForSequenceClassification"], **SUPPORTED, **dataclasses.asdict(config), **labels}
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": tokenize.limit, **SPECIAL}
    kind["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    with whole_folder(folder) as building:
        for name, value in {"config.json": values, "tokenizer_config.json": kind}.items():
            (building / name).write_text(json.dumps(value, indent=2) + "\n")
        (building / "tokenizer.json").write_text(tokenize.tokenizer.to_str(), encoding="utf-8")
        save_file(tensors, building / "model.safetensors", metadata={"format": "pt"})
