"""Nearest neighbours over ScaNN (Guo et al., ICML 2020), without TensorFlow, in less memory than the vectors take.

ScaNN holds codes of D / 4 bytes a vector, which say who the best may be; those few are then compared by their vectors,
which stay where they lie. Of a memory-mapped file only what a search touches is read, and given back after it.
"""

from __future__ import annotations

import itertools
import math
import mmap

import numpy as np
from scann.scann_ops.py import scann_ops_pybind

from jraggym.errors import InputError

TREE_FROM = 10_000  # documents; below, an exact search is as fast as a tree
CHUNK = 1 << 16  # vectors of one tree, at most: what is in memory as f32 while it is built
LEAVES_SEARCHED = 0.5  # fraction; top 32 of 11,863 MiniLM paragraphs: .2 agrees about .93, .3 .96, .5 .99
REORDER, LEAST_REORDER = 4, 128  # candidates that are scored exactly: a multiple of k, and at least so many
_MEASURE = {"cosine": "dot_product", "dot": "dot_product", "euclidean": "squared_l2"}
_DEFAULT_K = 32  # ScaNN wants one at build time; every search gives its own
_GATHERED = 1 << 18  # numbers of candidates' vectors at a time; the system maps up to 64 KB for each vector


class DenseIndex:
    """Ranks n vectors by their similarity to a query: exact below `TREE_FROM`, else trees and hashing."""

    def __init__(self, vectors: np.ndarray, similarity: str = "dot"):
        """Indexes f32 [n, D], which from `TREE_FROM` on must stay as they are: candidates are compared by them.

        Args:
          similarity: "dot", the same as "cosine" for vectors of unit length, or "euclidean".

        Raises:
          InputError: when the array is not [n, D] with n > 0, holds a value that is not finite, or the similarity is
            unknown.
        """
        if similarity not in _MEASURE:
            raise InputError("unknown similarity", got=repr(similarity), remedy=f"Known: {', '.join(_MEASURE)}.")
        self._map = getattr(vectors, "_mmap", None) if getattr(vectors, "mode", "") == "r" else None
        self._vectors = vectors = np.ascontiguousarray(vectors, np.float32)  # no copy of what is f32 and in order
        if vectors.ndim != 2 or not vectors.size:
            raise InputError("an index needs vectors [n, D]", got=vectors.shape, remedy="Give at least one vector.")
        self._euclidean = similarity == "euclidean"
        trees = math.ceil(len(vectors) / CHUNK)
        bounds = [len(vectors) * tree // trees for tree in range(trees + 1)]  # none much smaller than the others
        self._trees: list[tuple[int, scann_ops_pybind.ScannSearcher]] = []
        for start, stop in itertools.pairwise(bounds):
            part = vectors[start:stop]
            if not np.isfinite(part).all():
                got = f"nan or inf in row {start} to {stop}"
                raise InputError("the vectors to index are not all finite", got=got, remedy="Check the encoder.")
            self._trees.append((start, _build(part, _MEASURE[similarity])))
            self._forget()

    def search(self, vectors: np.ndarray, k: int) -> np.ndarray:
        """Gives the positions of the k best for f32 [Q, D], int32 [Q, k], best first; calls no jax.

        Equal similarities go by position. -1 fills up when k > n; a zero vector stands for no tokens and finds nothing.

        Raises:
          InputError: when the queries are not [Q, D] with the D of the index.
        """
        queries = np.ascontiguousarray(vectors, np.float32)
        n, dim = self._vectors.shape
        if queries.ndim != 2 or queries.shape[1] != dim:
            raise InputError(f"queries must be [Q, {dim}]", got=queries.shape, remedy="Use the encoder of the index.")
        found = np.full((len(queries), k), -1, np.int32)
        rows = np.flatnonzero(queries.any(axis=1))
        if len(rows):
            depth = min(k, n)
            exact = n < TREE_FROM
            positions, distances = self._candidates(
                queries[rows], depth if exact else min(max(REORDER * depth, LEAST_REORDER), n)
            )
            if not exact:
                distances = self._distances(queries[rows], positions)
            found[rows, :depth] = _ordered(positions, distances)[:, :depth]
        return found

    def _candidates(self, queries: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Positions int64 [Q, count], -1 where ScaNN could not fill a place, and their distances by codes."""
        positions, distances = [], []
        for start, tree in self._trees:
            found, scores = tree.search_batched(queries, final_num_neighbors=min(count, tree.size()))
            there = np.isfinite(scores)
            positions.append(np.where(there, found.astype(np.int64) + start, -1))
            distances.append(np.where(there, scores if self._euclidean else -scores, np.inf))
        every, scored = np.concatenate(positions, axis=1), np.concatenate(distances, axis=1)
        if every.shape[1] > count:
            best = np.argpartition(scored, count - 1, axis=1)[:, :count]
            every, scored = np.take_along_axis(every, best, axis=1), np.take_along_axis(scored, best, axis=1)
        return every, scored

    def _distances(self, queries: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Exact distances f32 [Q, C] of the candidates, few queries at a time."""
        distances = np.full(positions.shape, np.inf, np.float32)
        step = max(1, _GATHERED // (positions.shape[1] * queries.shape[1]))
        for i in range(0, len(queries), step):
            at, block = slice(i, i + step), self._vectors[positions[i : i + step]]  # [q, C, D]
            if self._euclidean:
                distances[at] = np.square(block - queries[at, None]).sum(axis=-1)
            else:
                distances[at] = -np.einsum("qcd,qd->qc", block, queries[at])
            self._forget()
        distances[positions < 0] = np.inf
        return distances

    def _forget(self) -> None:
        """Gives the pages of a mapped file back to the system, which reads them again when they are touched."""
        if self._map is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)


def _build(vectors: np.ndarray, measure: str) -> scann_ops_pybind.ScannSearcher:
    n = len(vectors)
    builder = scann_ops_pybind.builder(vectors, min(_DEFAULT_K, n), measure)
    if n < TREE_FROM:
        return builder.score_brute_force().build()
    leaves = math.isqrt(n)
    # k-means++ and one thread give the same tree in every process; the default start is drawn anew in each.
    builder = builder.tree(leaves, math.ceil(LEAVES_SEARCHED * leaves), training_sample_size=n, random_init=False)
    return builder.score_ah(2, anisotropic_quantization_threshold=0.2).set_n_training_threads(1).build()


def _ordered(positions: np.ndarray, distances: np.ndarray) -> np.ndarray:
    """Sorts each row by distance, then by position."""
    return np.take_along_axis(positions, np.lexsort((positions, distances), axis=-1), axis=-1)
