"""The retriever of the environment: BM25, dense vectors, or both fused, over one corpus in this process."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from jraggym.errors import InputError
from jraggym.retrieval.base import QueryRetriever
from jraggym.retrieval.bm25 import Bm25Index
from jraggym.retrieval.corpus import Corpus
from jraggym.retrieval.dense import DenseIndex
from jraggym.retrieval.encoder import Encoder, embed
from jraggym.retrieval.fusion import reciprocal_rank_fusion
from jraggym.types import Document


class HybridRetriever(QueryRetriever):
    """Finds the k best documents per query by BM25 (no encoder), by vectors (`lexical=False`), or by both.

    With both, the `depth` best of either ranking are merged by reciprocal rank fusion with `constant`.
    """

    def __init__(
        self,
        corpus: Corpus,
        encoder: Encoder | None = None,
        k: int = 2,
        depth: int = 32,
        *,
        lexical: bool = True,
        vectors: np.ndarray | None = None,
        constant: int = 60,
    ):
        """Builds the indexes.

        Args:
          vectors: f32 [len(corpus), D], the documents by `stored_vectors` or `embed`; embedded here if None.

        Raises:
          InputError: when there is neither encoder nor BM25, k or depth is below 1, or `vectors` has
            another length than the corpus.
        """
        if encoder is None and not lexical:
            raise InputError("a retriever needs an encoder or BM25", got="neither", remedy="Give an encoder.")
        if min(k, depth) < 1:
            raise InputError("k and depth must be positive", got=f"k={k}, depth={depth}", remedy="Use 1 or more.")
        if vectors is not None and len(vectors) != len(corpus):
            raise InputError("one vector per document is needed", got=len(vectors), remedy=f"Give {len(corpus)}.")
        super().__init__(encoder, k)
        self.corpus, self.depth, self._constant = corpus, depth, constant
        self._bm25 = Bm25Index(corpus.texts()) if lexical else None
        self._dense = None
        if encoder is not None:
            vectors = embed(encoder.document, corpus.documents) if vectors is None else vectors
            self._dense = DenseIndex(vectors, encoder.similarity)

    def _find(self, queries: list[str], vectors: np.ndarray, k: int) -> list[tuple[Document, ...]]:
        return [tuple(self.corpus[p] for p in row if p >= 0) for row in self._rank(queries, vectors, k)]

    def _rank(self, queries: list[str], vectors: np.ndarray, k: int) -> np.ndarray:
        """Corpus positions int32 [Q, k]."""
        if self._dense is None:
            assert self._bm25 is not None
            return self._bm25.search(queries, k)
        if self._bm25 is None:
            return self._dense.search(vectors, k)
        depth = max(self.depth, k)
        rankings = [self._bm25.search(queries, depth), self._dense.search(vectors, depth)]
        return reciprocal_rank_fusion(rankings, k, self._constant)


class BrokenRetriever:
    """The control: looks like `retriever`, and returns random documents that depend on (seed, query) alone."""

    def __init__(self, retriever: HybridRetriever, seed: int):
        self._retriever, self._seed = retriever, seed
        self.corpus, self.encoder, self.k = retriever.corpus, retriever.encoder, retriever.k
        self.params, self.dim, self.query_tokens = retriever.params, retriever.dim, retriever.query_tokens
        self.tokenize, self.encode = retriever.tokenize, retriever.encode

    def search(self, queries: Sequence[str], vectors: np.ndarray, k: int | None = None) -> list[tuple[Document, ...]]:
        """Gives k distinct random documents per query; a blank query finds nothing; calls no jax."""
        return [self._draw(query, k or self.k) if query.strip() else () for query in queries]

    def _draw(self, query: str, k: int) -> tuple[Document, ...]:
        digest = hashlib.sha256(query.encode()).digest()
        rng = np.random.default_rng([self._seed, int.from_bytes(digest[:8], "big")])
        positions = rng.choice(len(self.corpus), size=min(k, len(self.corpus)), replace=False)
        return tuple(self.corpus[int(p)] for p in positions)

    def __call__(self, queries: Sequence[str], k: int | None = None) -> list[tuple[Document, ...]]:
        """Gives what `search` gives, from texts alone."""
        return self.search(queries, np.zeros((len(queries), 0), np.float32), k)


Retriever = HybridRetriever | BrokenRetriever
