"""A retriever on Milvus: vectors and BM25 of a corpus that no single host could hold, searched over the network.

    retriever = MilvusRetriever(Milvus("http://milvus:19530", "wiki", index="SCANN"), encoder, corpus=corpus.documents)
    later = MilvusRetriever(Milvus("http://milvus:19530", "wiki"), encoder)

The first makes the collection, or checks that it holds just this corpus; the second searches it as it is, and needs no
corpus in memory: documents come with the answers. Letters: Q queries, D vector width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from jraggym.errors import InputError
from jraggym.retrieval.base import QueryRetriever
from jraggym.retrieval.encoder import Encoder
from jraggym.retrieval.milvus_collection import Collection, Milvus, plain, reason, searched
from jraggym.types import Document

_FIELDS = ["document", "title", "content"]
_REQUEST = 64  # queries a request, at most


class MilvusRetriever(QueryRetriever):
    """Finds the k best documents per query by vectors and BM25, or by vectors alone (`lexical=False`).

    With both, the server merges the `depth` best of either ranking by reciprocal rank fusion with `constant`. Queries
    without a token that the encoder knows are searched by BM25 alone.
    """

    def __init__(
        self,
        milvus: Milvus,
        encoder: Encoder,
        k: int = 2,
        depth: int = 32,
        *,
        corpus: Sequence[Document] | None = None,
        vectors: Callable[[], np.ndarray] | None = None,
        lexical: bool = True,
        constant: int = 60,
    ):
        """Makes the collection where it is not whole, and opens it.

        Args:
          corpus: what the collection holds, or is to hold; None: it is searched as it is.
          vectors: gives the corpus's f32 [n, D], as `stored_vectors` does; called when documents are to be written.

        Raises:
          InputError: when k or depth is below 1, the filter is none, or the collection cannot be used: it is not
            there, is not whole, or holds another corpus or vectors of another encoder.
        """
        if min(k, depth) < 1:
            raise InputError("k and depth must be positive", got=f"k={k}, depth={depth}", remedy="Use 1 or more.")
        super().__init__(encoder, k)
        self.depth, self._lexical, self._constant = depth, lexical, constant
        self._milvus, self._collection = milvus, Collection(milvus)
        try:
            if corpus is not None:
                self._collection.make(encoder, corpus, vectors)
            self._open(encoder)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends the connection to the server."""
        self._collection.close()

    def _open(self, encoder: Encoder) -> None:
        size, there = self._collection.check(encoder), self._collection.count()
        if there != size:
            got, remedy = f"{there} of {size} documents", "Give the corpus, and it is gone on with."
            raise InputError(f"the collection {self._milvus.collection} is not whole", got=got, remedy=remedy)
        self._size, self._index = size, self._collection.index()["index_type"]
        if self._milvus.filter:
            try:
                self._collection.request("query", filter=self._milvus.filter, limit=1, output_fields=["document"])
            except Exception as error:
                remedy = "Write an expression over document, title and content."
                raise InputError(f"no filter: {self._milvus.filter}", got=reason(error), remedy=remedy) from error

    def _find(self, queries: list[str], vectors: np.ndarray, k: int) -> list[tuple[Document, ...]]:
        """Raises InputError for vectors of another width, and what pymilvus does when the server gives no answer."""
        if vectors.shape != (len(queries), self.dim):
            want, got = f"query vectors must be [{len(queries)}, {self.dim}]", list(vectors.shape)
            raise InputError(want, got=got, remedy="Use the encoder of the collection.")
        vectors = np.ascontiguousarray(vectors, np.float32)
        known: np.ndarray = np.any(vectors, axis=1)
        size = min(max(-(-len(queries) // self._milvus.concurrency), 1), _REQUEST)
        blocks = [
            rows[i : i + size]
            for rows in (np.flatnonzero(known), np.flatnonzero(~known))
            for i in range(0, len(rows), size)
            if self._lexical or known[rows[i]]
        ]
        found: list[tuple[Document, ...]] = [()] * len(queries)

        def ask(rows: np.ndarray) -> None:
            hits = self._ask([queries[i] for i in rows], vectors[rows] if known[rows[0]] else None, k)
            for row, documents in zip(rows, hits, strict=True):
                found[row] = tuple(_document(hit["entity"]) for hit in documents)

        with ThreadPoolExecutor(self._milvus.concurrency) as pool:
            list(pool.map(ask, blocks))
        return found

    def _ask(self, queries: list[str], vectors: np.ndarray | None, k: int) -> Any:
        """One request: by words, by vectors, or by both."""
        depth = max(self.depth, k)
        routes: list[tuple[str, list[Any], dict[str, Any]]] = []
        if vectors is not None:
            routes.append(("vector", list(vectors), {"params": searched(self._index, self._size, depth)}))
        if self._lexical:
            routes.append(("words", [plain(query) for query in queries], {"params": {}}))
        if len(routes) == 1:
            [(field, data, params)] = routes
            return self._collection.request(
                "search",
                data=data,
                anns_field=field,
                limit=k,
                filter=self._milvus.filter,
                search_params=params,
                output_fields=_FIELDS,
            )
        from pymilvus import AnnSearchRequest, RRFRanker

        only = self._milvus.filter or None
        parts = [AnnSearchRequest(data, field, params, limit=depth, expr=only) for field, data, params in routes]
        return self._collection.request(
            "hybrid_search", reqs=parts, ranker=RRFRanker(self._constant), limit=k, output_fields=_FIELDS
        )


def _document(row: dict[str, str]) -> Document:
    """The document of a row, whose content is its title, ". " and its text."""
    return Document(row["document"], row["title"], row["content"][len(row["title"]) + 2 :])
