"""Nearest neighbours over ScaNN (Guo et al., ICML 2020), without TensorFlow, in less memory than the vectors take.

ScaNN holds codes of D / 4 bytes a vector, which say who the best may be; those few are then compared by their vectors,
which stay where they lie. Of a memory-mapped file a search reads the rows of its candidates and no more.
"""

from __future__ import annotations

import itertools
import math
import mmap
import os
import weakref
from typing import Any

import numpy as np
from scann.scann_ops.py import scann_ops_pybind

from jraggym.errors import InputError

TREE_FROM = 10_000  # documents; below, an exact search is as fast as a tree
CHUNK = 1 << 16  # vectors of one tree, at most: what is in memory as f32 while it is built
LEAVES_SEARCHED = 0.5  # fraction; top 32 of 11,863 MiniLM paragraphs: .2 agrees about .93, .3 .96, .5 .99
REORDER, LEAST_REORDER = 4, 128  # candidates that are scored exactly: a multiple of k, and at least so many
_MEASURE = {"cosine": "dot_product", "dot": "dot_product", "euclidean": "squared_l2"}
_DEFAULT_K = 32  # ScaNN wants one at build time; every search gives its own


class DenseIndex:
    """Ranks n vectors by their similarity to a query: exact below `TREE_FROM`, else trees and hashing."""

    def __init__(self, vectors: np.ndarray, similarity: str = "dot"):
        """Indexes f32 [n, D], which must stay as they are: candidates are compared by them.

        Args:
          similarity: "dot", the same as "cosine" for vectors of unit length, or "euclidean".

        Raises:
          InputError: when the array is not [n, D] with n > 0, holds a value that is not finite, or the similarity is
            unknown.
        """
        if similarity not in _MEASURE:
            raise InputError("unknown similarity", got=repr(similarity), remedy=f"Known: {', '.join(_MEASURE)}.")
        self._file = _File(vectors) if _File.holds(vectors) else None
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
            if self._file is not None:
                self._file.forget()

    def search(self, vectors: np.ndarray, k: int) -> np.ndarray:
        """Gives the positions of the k best for f32 [Q, D], int32 [Q, k], best first: the first half of `nearest`."""
        return self.nearest(vectors, k)[0]

    def nearest(self, vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Gives positions int32 [Q, k] and distances f32 [Q, k] (a similarity with its sign turned), nearest first.

        Equal similarities go by position. -1 and an infinite distance fill up when k > n; a zero vector stands for no
        tokens and finds nothing.

        Raises:
          InputError: when the queries are not [Q, D] with the D of the index.
        """
        queries = np.ascontiguousarray(vectors, np.float32)
        n, dim = self._vectors.shape
        if queries.ndim != 2 or queries.shape[1] != dim:
            raise InputError(f"queries must be [Q, {dim}]", got=queries.shape, remedy="Use the encoder of the index.")
        found, far = np.full((len(queries), k), -1, np.int32), np.full((len(queries), k), np.inf, np.float32)
        rows = np.flatnonzero(queries.any(axis=1))
        if len(rows):
            depth = min(k, n)
            positions = self._candidates(queries[rows], min(max(REORDER * depth, LEAST_REORDER), n))
            positions, distances = _ordered(positions, self._distances(queries[rows], positions))
            found[rows, :depth], far[rows, :depth] = positions[:, :depth], distances[:, :depth]
        return found, far

    def _candidates(self, queries: np.ndarray, count: int) -> np.ndarray:
        """Positions int64 [Q, count] of who may be the best, -1 where ScaNN could not fill a place.

        A query at a time: what ScaNN finds for a batch depends on all of its queries. With trees that is as fast;
        an exact search of 9,999 vectors of 384 numbers takes .7 ms, not .14.
        """
        width = sum(min(count, tree.size()) for _, tree in self._trees)
        every = np.full((len(queries), width), -1, np.int64)
        scored = np.full((len(queries), width), np.inf, np.float32)
        for row, query in enumerate(queries):
            filled = 0
            for start, tree in self._trees:
                found, scores = tree.search(query, final_num_neighbors=min(count, tree.size()))
                here = slice(filled, filled := filled + len(found))
                every[row, here], scored[row, here] = found.astype(np.int64) + start, scores
        if width == count:
            return every
        scored = np.where(every < 0, np.inf, scored if self._euclidean else -scored)
        return np.take_along_axis(every, np.argpartition(scored, count - 1, axis=1)[:, :count], axis=1)

    def _distances(self, queries: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Exact distances f32 [Q, C] of the candidates, a query at a time; the same for equal vectors."""
        distances = np.full(positions.shape, np.inf, np.float32)
        for row, query, at in zip(distances, queries, positions, strict=True):
            candidates = self._vectors[at] if self._file is None else self._file.rows(at)  # [C, D]
            if self._euclidean:
                row[:] = np.square(candidates - query).sum(axis=1)
            else:  # not `@`: a row of a matrix product is rounded by its place in the matrix
                row[:] = -np.einsum("cd,d->c", candidates, query)
        distances[positions < 0] = np.inf
        return distances


class _File:
    """The file of memory-mapped vectors f32 [n, D], read by rows: around a touched page the system maps megabytes."""

    def __init__(self, vectors: Any):
        self._map, self._first, self._shape = vectors.base, vectors.offset, vectors.shape
        self._number = os.open(str(vectors.filename), os.O_RDONLY)
        weakref.finalize(self, os.close, self._number)

    @staticmethod
    def holds(vectors: np.ndarray) -> bool:
        """Whether these are all vectors of a file that is only read, on a system that can read rows of it."""
        able = hasattr(os, "pread") and hasattr(mmap, "MADV_DONTNEED")
        whole = isinstance(vectors, np.memmap) and isinstance(vectors.base, mmap.mmap) and vectors.mode == "r"
        return able and whole and vectors.dtype == np.float32 and vectors.flags.c_contiguous

    def rows(self, positions: np.ndarray) -> np.ndarray:
        """The vectors f32 [C, D] at these positions; the last one for -1."""
        n, dim = self._shape
        places = [self._first + 4 * dim * int(position % n) for position in positions]
        found = b"".join(os.pread(self._number, 4 * dim, place) for place in places)
        return np.frombuffer(found, np.float32).reshape(len(positions), dim)

    def forget(self) -> None:
        """Gives the mapped pages back to the system, which reads them again when they are touched."""
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


def _ordered(positions: np.ndarray, distances: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sorts each row by distance, then by position."""
    order = np.lexsort((positions, distances), axis=-1)
    return np.take_along_axis(positions, order, axis=-1), np.take_along_axis(distances, order, axis=-1)
