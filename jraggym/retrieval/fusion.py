"""Reciprocal rank fusion (Cormack, Clarke, Büttcher, SIGIR 2009)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def reciprocal_rank_fusion(rankings: Sequence[np.ndarray], k: int, constant: int = 60) -> np.ndarray:
    """Merges rankings of corpus positions into the k best, int32 [Q, k], -1 where there are fewer.

    A document scores the sum of 1 / (constant + rank) over the rankings that hold it, with ranks from 1.
    Equal scores go by position. Example: [[7, 3]] and [[3, 9]] give 3 (1/62 + 1/61), 7 (1/61), 9 (1/62).

    Args:
      rankings: int arrays [Q, k_i], best first; -1 is no document.
    """
    documents = np.concatenate(rankings, axis=1).astype(np.int64)
    gains = np.concatenate([1 / (constant + 1 + np.arange(ranking.shape[1])) for ranking in rankings])
    query, column = np.nonzero(documents >= 0)
    # One integer per (query, document); its distinct values come out sorted by query, then by position.
    span = documents.max(initial=0) + 1
    pairs, pair_of = np.unique(query * span + documents[query, column], return_inverse=True)
    # Rounded, so that the order of summation breaks no tie.
    scores = np.bincount(pair_of, weights=gains[column], minlength=len(pairs)).round(12)
    query, document = pairs // span, pairs % span
    order = np.lexsort((document, -scores, query))
    query, document = query[order], document[order]
    rank = np.arange(len(query)) - np.searchsorted(query, query)  # within its query, from 0
    fused = np.full((len(documents), k), -1, np.int32)
    fused[query[rank < k], rank[rank < k]] = document[rank < k]
    return fused
