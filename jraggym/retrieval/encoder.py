"""Text encoders: texts to token ids on the host, token ids to unit vectors in jax.

The two halves are apart because a rollout runs the first inside a host callback, where jax must not be
called, and the second on the device between two callbacks. Letters: Q queries, T tokens, D vector width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer

from jraggym.errors import InputError
from jraggym.retrieval.corpus import words

BUCKETS = (16, 32, 64, 96, 128, 192, 256, 384, 512)  # token counts that `embed` pads to
_SLAB = 8_192  # texts tokenized at a time: bounds the memory of a large corpus


class Encoder(Protocol):
    """What a dense retriever asks of an encoder."""

    @property
    def params(self) -> Any:
        """A pytree of arrays."""

    @property
    def dim(self) -> int:
        """D, the width of a vector."""

    @property
    def query_tokens(self) -> int:
        """T of a tokenized query."""

    @property
    def max_tokens(self) -> int:
        """The most tokens of a document that count."""

    def tokenize(self, texts: Sequence[str], max_tokens: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Gives ids int32 [Q, T] and mask bool [Q, T], T = max_tokens or query_tokens; calls no jax."""

    def apply(self, params: Any, ids: Array, mask: Array) -> Array:
        """Gives unit vectors f32 [Q, D]; the zero vector for a row without tokens. Pure jax."""


def unit(vectors: Array) -> Array:
    """Scales each row of f32 [..., D] to length 1; a zero row stays zero."""
    length = jnp.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / jnp.where(length > 0, length, 1)


def embed(
    encoder: Encoder, texts: Sequence[str], batch: int = 64, progress: Callable[[int], None] | None = None
) -> np.ndarray:
    """Embeds texts as documents, f32 [len(texts), D], in jitted batches of a few fixed shapes.

    Texts are sorted by length, so that short ones are not padded to the longest. `progress` is told the
    number of texts done so far.
    """
    apply = jax.jit(encoder.apply)
    vectors = np.zeros((len(texts), encoder.dim), np.float32)
    done = 0
    for start in range(0, len(texts), _SLAB):
        ids, mask = encoder.tokenize(texts[start : start + _SLAB], encoder.max_tokens)
        order = np.argsort(-mask.sum(1), kind="stable")  # longest first: only short texts fill a part batch
        for i in range(0, len(order), batch):
            rows = order[i : i + batch]
            width = _bucket(int(mask[rows].sum(1).max()), encoder.max_tokens)
            block = [np.pad(x[rows, :width], ((0, batch - len(rows)), (0, 0))) for x in (ids, mask)]
            vectors[start + rows] = np.asarray(apply(encoder.params, *block))[: len(rows)]
            done += len(rows)
            if progress is not None:
                progress(done)
    return vectors


def _bucket(length: int, most: int) -> int:
    """The smallest padded length for `length` tokens; powers of two above the table, never above `most`."""
    fits = [size for size in BUCKETS if size >= length] or [1 << (length - 1).bit_length()]
    return min(fits[0], most)


@dataclass(frozen=True, eq=False)
class TfidfEncoder:
    """TF-IDF followed by a truncated SVD (latent semantic analysis), as an embedding bag in jax.

    The vector of a text is unit(sum over its words of table[word]) with table[w] = idf_w * V_w. The L2 norm
    of the TF-IDF vector is a positive factor, which `unit` cancels. Unknown words are dropped.
    """

    params: Array  # f32 [V + 1, D], one row per word; row 0 is zero and stands for padding
    vocabulary: dict[str, int]
    max_tokens: int
    query_tokens: int = 32

    @classmethod
    def fit(cls, texts: Sequence[str], dim: int = 128, seed: int = 0) -> TfidfEncoder:
        """Learns words, idf and the SVD from the texts; D is at most their number and that of words.

        Raises:
          InputError: when no text holds a word.
        """
        lengths = [len(words(text)) for text in texts]
        if not any(lengths):
            raise InputError(
                "TF-IDF finds no word in the texts", got=f"{len(texts)} texts", remedy="Give texts with words."
            )
        tfidf = TfidfVectorizer(analyzer=words, dtype=np.float32)
        counts = tfidf.fit_transform(texts)
        svd = TruncatedSVD(min(dim, *counts.shape), random_state=seed).fit(counts)
        table = np.zeros((counts.shape[1] + 1, svd.components_.shape[0]), np.float32)
        table[1:] = tfidf.idf_[:, None] * svd.components_.T
        vocabulary = {word: int(column) + 1 for word, column in tfidf.vocabulary_.items()}
        return cls(jnp.asarray(table), vocabulary, max_tokens=max(lengths))

    @property
    def dim(self) -> int:
        return self.params.shape[1]

    def tokenize(self, texts: Sequence[str], max_tokens: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Gives the ids of the known words, int32 [Q, T], cut to T, and their mask bool [Q, T]."""
        width = max_tokens or self.query_tokens
        ids = np.zeros((len(texts), width), np.int32)
        for row, text in zip(ids, texts, strict=True):
            known = [self.vocabulary[word] for word in words(text) if word in self.vocabulary][:width]
            row[: len(known)] = known
        return ids, ids > 0

    def apply(self, params: Array, ids: Array, mask: Array) -> Array:
        """Gives unit vectors f32 [Q, D]."""
        return unit(jnp.sum(params[ids] * mask[..., None], axis=1))
