"""BM25 over an inverted index, with every score computed at build time (the `bm25s` library)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jraggym.errors import InputError
from jraggym.retrieval.corpus import words


class Bm25Index:
    """Ranks texts by BM25 (the Lucene variant: idf = log(1 + (n - df + 0.5) / (df + 0.5)))."""

    def __init__(self, texts: Sequence[str], k1: float = 1.2, b: float = 0.75):
        """Indexes `texts`; raises InputError when none of them holds a word."""
        # Imported here: the import of bm25s runs a jax operation, which starts the jax backend.
        import bm25s

        self._vocabulary: dict[str, int] = {}
        ids = [[self._vocabulary.setdefault(w, len(self._vocabulary)) for w in words(text)] for text in texts]
        if not self._vocabulary:
            raise InputError(
                "BM25 finds no word in the texts", got=f"{len(texts)} texts", remedy="Give texts with words."
            )
        self._size = len(texts)
        self._index = bm25s.BM25(k1=k1, b=b, method="lucene", csc_backend="scipy")
        self._index.index((ids, self._vocabulary), create_empty_token=False, show_progress=False)

    def search(self, queries: Sequence[str], k: int) -> np.ndarray:
        """Gives the corpus positions of the k best texts per query, int32 [Q, k], best first.

        Only texts with a score above zero count; -1 fills the rest. Equal scores go by position.
        """
        found = np.full((len(queries), k), -1, np.int32)
        for row, query in zip(found, queries, strict=True):
            ids = [self._vocabulary[word] for word in words(query) if word in self._vocabulary]
            if ids:
                # Not `retrieve`: it calls jax for the top k, and a search may run inside a jax callback.
                best = _top(self._index.get_scores_from_ids(ids), k)
                row[: len(best)] = best
        return found


def _top(scores: np.ndarray, k: int) -> np.ndarray:
    """Positions of the k highest positive scores, best first, equal scores by position."""
    kept = np.flatnonzero(scores > 0)  # first: a partition among thousands of equal zeros is slow
    if k < len(kept):
        positive = scores[kept]
        kept = kept[positive >= np.partition(positive, -k)[-k]]
    return kept[np.lexsort((kept, -scores[kept]))][:k]
