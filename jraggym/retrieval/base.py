"""What all retrievers share: the encoder of the queries, and the way from a batch of queries to documents.

A rollout calls a retriever in three parts: `tokenize` in a host callback, `encode` on the device, `search` in the
next host callback. From Python, call the object itself. Letters: Q queries, T tokens, D vector width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jraggym.retrieval.encoder import Encoder
from jraggym.types import Document


class QueryRetriever:
    """A retriever but for `_find`, which looks up distinct queries; without an encoder their vectors have no width."""

    def __init__(self, encoder: Encoder | None, k: int):
        self.encoder, self.k = encoder, k
        self._jitted = jax.jit(self.encode)

    @property
    def params(self) -> Any:
        """The weights of the encoder's query tower, an empty tuple without one."""
        return () if self.encoder is None else self.encoder.query.params

    @property
    def dim(self) -> int:
        """D, 0 without an encoder."""
        return 0 if self.encoder is None else self.encoder.query.dim

    @property
    def query_tokens(self) -> int:
        """T, 0 without an encoder."""
        return 0 if self.encoder is None else self.encoder.query.max_tokens

    def tokenize(self, queries: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Gives ids int32 [Q, T] and mask bool [Q, T]; calls no jax."""
        if self.encoder is None:
            return np.zeros((len(queries), 0), np.int32), np.zeros((len(queries), 0), bool)
        return self.encoder.query.tokenize(queries)

    def encode(self, params: Any, ids: Array, mask: Array) -> Array:
        """Gives query vectors f32 [Q, D]; pure jax."""
        if self.encoder is None:
            return jnp.zeros((ids.shape[0], 0), jnp.float32)
        return self.encoder.query.apply(params, ids, mask)

    def search(self, queries: Sequence[str], vectors: np.ndarray, k: int | None = None) -> list[tuple[Document, ...]]:
        """Gives the k best documents per query, best first, fewer where fewer match; calls no jax.

        A repeated query is searched once, and a blank one, such as an unused slot of a batch, finds nothing.

        Args:
          vectors: f32 [Q, D] from `encode`.
        """
        first: dict[str, int] = {}
        for row, query in enumerate(queries):
            if query.strip():
                first.setdefault(query, row)
        documents = self._find(list(first), np.asarray(vectors)[list(first.values())], k or self.k) if first else []
        found = dict(zip(first, documents, strict=True))
        return [found.get(query, ()) for query in queries]

    def _find(self, queries: list[str], vectors: np.ndarray, k: int) -> list[tuple[Document, ...]]:
        """The documents of distinct queries that are not blank, at least one; vectors f32 [Q, D]."""
        raise NotImplementedError

    def __call__(self, queries: Sequence[str], k: int | None = None) -> list[tuple[Document, ...]]:
        """Goes the whole way from texts to documents; compiles once per number of queries."""
        return self.search(queries, np.asarray(self._jitted(self.params, *self.tokenize(queries))), k)
