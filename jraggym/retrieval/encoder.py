"""Text encoders: texts to token ids on the host, token ids to vectors in jax.

The two halves are apart because a rollout runs the first inside a host callback, where jax must not be
called, and the second on the device between two callbacks. Letters: Q texts, T tokens, D vector width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from threadpoolctl import threadpool_limits

from jraggym.errors import InputError
from jraggym.retrieval.corpus import words, written
from jraggym.sharding import batch_sharding, batch_shards
from jraggym.types import Document

BUCKETS = (16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512)  # token counts padded to
BATCH, CPU_BATCH = 256, 8  # texts
_CHUNK = 8_192  # texts tokenized at a time: bounds the memory of a large corpus


class Tower(Protocol):
    """One side of an encoder: what turns its queries, or its documents, into vectors."""

    @property
    def params(self) -> Any:
        """A pytree of arrays."""

    @property
    def dim(self) -> int:
        """D, the width of a vector."""

    @property
    def max_tokens(self) -> int:
        """T: the most tokens of a text that count."""

    @property
    def settings(self) -> str:
        """All that its vectors depend on beside the text and `params`, as a text."""

    def tokenize(self, texts: Sequence[str | Document]) -> tuple[np.ndarray, np.ndarray]:
        """Gives ids int32 [Q, T] and a mask [Q, T], bool or the number of a segment; calls no jax."""

    def apply(self, params: Any, ids: Array, mask: Array) -> Array:
        """Gives vectors f32 [Q, D] for any T; the zero vector for a row without tokens. Pure jax."""


class Encoder(Protocol):
    """What a dense retriever asks of an encoder; both towers may share weights."""

    @property
    def query(self) -> Tower: ...

    @property
    def document(self) -> Tower: ...

    @property
    def similarity(self) -> str:
        """How its vectors compare: "cosine" (they are of unit length), "dot" or "euclidean"."""


def unit(vectors: Array) -> Array:
    """Scales each row of f32 [..., D] to length 1; a zero row stays zero."""
    length = jnp.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / jnp.where(length > 0, length, 1)


def embed(
    tower: Tower,
    texts: Sequence[str | Document],
    batch: int | None = None,
    progress: Callable[[int], None] | None = None,
    mesh: Mesh | None = None,
) -> np.ndarray:
    """Embeds texts, f32 [len(texts), D]; `embed_chunks` says how."""
    vectors = np.zeros((len(texts), tower.dim), np.float32)
    for start, rows in embed_chunks(tower, texts, batch, progress, mesh):
        vectors[start : start + len(rows)] = rows
    return vectors


def embed_chunks(
    tower: Tower,
    texts: Sequence[str | Document],
    batch: int | None = None,
    progress: Callable[[int], None] | None = None,
    mesh: Mesh | None = None,
    *,
    first: int = 0,
    chunk: int = _CHUNK,
) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (position, f32 [chunk, D]) for the texts from `first` on, in jitted batches of a few fixed shapes.

    The texts of a chunk are sorted by length, so that short ones are not padded to the longest. On a `mesh` the rows of
    a batch are split over its devices, which all belong to this process.

    Args:
      batch: texts at a time; by default few on a CPU, whose caches hold the activations of no more, and many elsewhere.
      progress: is told the number of texts done so far.
    """
    params, spread, batch = tower.params, None, batch or (CPU_BATCH if jax.default_backend() == "cpu" else BATCH)
    if mesh is not None:
        params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
        spread, batch = batch_sharding(mesh), -(-batch // batch_shards(mesh)) * batch_shards(mesh)
    apply = _compiled(tower)
    done = first
    for start in range(first, len(texts), chunk):
        ids, mask = tower.tokenize(texts[start : start + chunk])
        lengths = (mask > 0).sum(1)
        vectors = np.zeros((len(ids), tower.dim), np.float32)
        order = np.argsort(-lengths, kind="stable")  # longest first: only short texts fill a part batch
        for i in range(0, len(order), batch):
            rows = order[i : i + batch]
            width = _bucket(int(lengths[rows].max()), tower.max_tokens)
            block = [np.pad(x[rows, :width], ((0, batch - len(rows)), (0, 0))) for x in (ids, mask)]
            vectors[rows] = np.asarray(apply(params, *jax.device_put(block, spread)))[: len(rows)]
            done += len(rows)
            if progress is not None:
                progress(done)
        yield start, vectors


def _compiled(tower: Tower) -> Callable[[Any, Array, Array], Array]:
    """The jitted `apply` of a tower, kept with it: a jit of one's own in each call would compile anew in each."""
    kept = vars(tower)
    if "_compiled" not in kept:
        kept["_compiled"] = jax.jit(tower.apply)
    return kept["_compiled"]


def _bucket(length: int, most: int) -> int:
    """The smallest padded length for `length` tokens; powers of two above the table, never above `most`."""
    fits = [size for size in BUCKETS if size >= length] or [1 << (length - 1).bit_length()]
    return min(fits[0], most)


@dataclass(frozen=True, eq=False)
class TfidfTower:
    """An embedding bag in jax: the vector of a text is unit(sum over its words of params[word])."""

    params: Array  # f32 [V + 1, D], one row per word; row 0 is zero and stands for padding
    vocabulary: dict[str, int]
    max_tokens: int

    @property
    def dim(self) -> int:
        return self.params.shape[1]

    @property
    def settings(self) -> str:
        return repr((self.vocabulary, self.max_tokens))

    def tokenize(self, texts: Sequence[str | Document]) -> tuple[np.ndarray, np.ndarray]:
        """Gives the ids of the known words, int32 [Q, T], cut to T, and their mask bool [Q, T]."""
        ids = np.zeros((len(texts), self.max_tokens), np.int32)
        for row, text in zip(ids, texts, strict=True):
            known = [self.vocabulary[word] for word in words(written(text)) if word in self.vocabulary]
            row[: len(known)] = known[: self.max_tokens]
        return ids, ids > 0

    def apply(self, params: Array, ids: Array, mask: Array) -> Array:
        """Gives unit vectors f32 [Q, D]."""
        return unit(jnp.sum(params[ids] * mask[..., None], axis=1))


@dataclass(frozen=True, eq=False)
class TfidfEncoder:
    """TF-IDF followed by a truncated SVD (latent semantic analysis), of queries and documents alike.

    The table of its towers is table[w] = idf_w * V_w. The L2 norm of the TF-IDF vector is a positive factor, which
    `unit` cancels. Unknown words are dropped.
    """

    query: TfidfTower
    document: TfidfTower
    similarity: str = "cosine"

    @classmethod
    def fit(cls, texts: Sequence[str], dim: int = 128, seed: int = 0, query_tokens: int = 32) -> TfidfEncoder:
        """Learns words, idf and the SVD from the texts; D is at most their number and that of words.

        Raises:
          InputError: when no text holds a word.
        """
        # Two seconds to import, for which no other command has to wait
        from sklearn.decomposition import TruncatedSVD
        from sklearn.feature_extraction.text import TfidfVectorizer

        lengths = [len(words(text)) for text in texts]
        if not any(lengths):
            raise InputError(
                "TF-IDF finds no word in the texts", got=f"{len(texts)} texts", remedy="Give texts with words."
            )
        tfidf = TfidfVectorizer(analyzer=words, dtype=np.float32)
        counts = tfidf.fit_transform(texts)
        with threadpool_limits(1, user_api="blas"):  # the last digits depend on the number of threads
            svd = TruncatedSVD(min(dim, *counts.shape), random_state=seed).fit(counts)
        table = np.zeros((counts.shape[1] + 1, svd.components_.shape[0]), np.float32)
        table[1:] = tfidf.idf_[:, None] * svd.components_.T
        vocabulary = {word: int(column) + 1 for word, column in tfidf.vocabulary_.items()}
        params = jnp.asarray(table)
        query, document = (TfidfTower(params, vocabulary, tokens) for tokens in (query_tokens, max(lengths)))
        return cls(query, document)
