"""A dense index that is spread over all devices of a mesh, and so over its hosts: none of them holds all vectors.

    embed the queries                                  on the device, each of them for its own rows
    gather all query vectors                           on the device
    find the k best of one's part of the corpus        host callback, each host for the parts of its devices
    gather and merge them                              on the device: [Q, k] positions
    read the texts of one's own rows                   host callback of the rollout

The parts are contiguous ranges of the corpus, so the result is that of one index over all of it: exactly, where each
part is searched exactly (see dense.TREE_FROM).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from jraggym.errors import InputError
from jraggym.host_calls import pieces
from jraggym.retrieval.dense import DenseIndex
from jraggym.retrieval.encoder import Encoder
from jraggym.retrieval.guard import guarded
from jraggym.sharding import place, whole_on
from jraggym.types import Document

_FAILED = -2  # in place of a position: a part of the index could not be searched


class Documents(Protocol):
    """The texts of a corpus: a `Corpus`, or `Texts` on disk that all hosts can read."""

    def __len__(self) -> int: ...
    def __getitem__(self, position: int) -> Document: ...


class ShardedRetriever:
    """Finds the k nearest documents by vectors; `vectors` may lie on disk, and each host reads its part alone."""

    def __init__(
        self,
        documents: Documents,
        encoder: Encoder,
        vectors: np.ndarray,
        mesh: Mesh,
        k: int = 2,
        *,
        timeout: float = 30.0,
    ):
        """Builds the indexes of this host's devices.

        Args:
          vectors: f32 [len(documents), D], by `stored_vectors`: memory-mapped, of a file that all hosts can read.
          timeout: seconds for a search of a part.

        Raises:
          InputError: when k is below 1, or there are other vectors than documents, or fewer than devices.
        """
        if k < 1 or len(vectors) != len(documents) or len(vectors) < mesh.size:
            got = f"k={k}, {len(documents)} documents, {len(vectors)} vectors, {mesh.size} devices"
            remedy = "Give one vector for each document, and at least one for each device."
            raise InputError("this index cannot be spread", got=got, remedy=remedy)
        self._documents, self._encoder, self._mesh, self.k = documents, encoder, mesh, k
        self._timeout = timeout
        bounds = [len(vectors) * i // mesh.size for i in range(mesh.size + 1)]
        self._parts = {
            i: (bounds[i], DenseIndex(vectors[bounds[i] : bounds[i + 1]], encoder.similarity))
            for i, device in enumerate(mesh.devices.flat)
            if device.process_index == jax.process_index()
        }
        self._jitted = jax.jit(self.encode)

    @property
    def params(self) -> Any:
        """The weights of the encoder's query tower."""
        return self._encoder.query.params

    def tokenize(self, queries: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Gives ids int32 [Q, T] and a mask [Q, T]; calls no jax."""
        return self._encoder.query.tokenize(queries)

    def encode(self, params: Any, ids: Array, mask: Array) -> Array:
        """Gives the positions of the k best documents of each query, int32 [Q, k], best first; -1 fills up.

        All devices of the mesh come here together: a rollout whose devices each run a loop of their own, as that of
        transcripts does, cannot.
        """
        vectors = self._encoder.query.apply(params, ids, mask)
        if jax.sharding.get_abstract_mesh().manual_axes:
            remedy = "Use it in a Rollout, or give this rollout a retriever that each host holds whole."
            raise InputError("a sharded index needs all devices at once", got="devices on their own", remedy=remedy)
        whole = PartitionSpec()
        search = jax.shard_map(self._on_device, mesh=self._mesh, in_specs=whole, out_specs=whole, check_vma=False)
        return search(vectors)

    def search(self, queries: Sequence[str], found: np.ndarray, k: int | None = None) -> list[tuple[Document, ...]]:
        """Gives the documents at the positions int32 [Q, self.k] that `encode` found, at most k of each; calls no jax.

        Raises InputError for a k above the retriever's own, and RuntimeError when a part could not be searched.
        """
        if (k or self.k) > self.k:
            raise InputError("the index gives fewer documents", got=f"k={k}", remedy=f"Build it with k={k}.")
        if (np.asarray(found) == _FAILED).any():
            raise RuntimeError("a part of the index could not be searched, see the messages of its host")
        rows = np.asarray(found)[:, : k or self.k]
        return [
            tuple(self._documents[int(p)] for p in row if p >= 0) if query.strip() else ()
            for query, row in zip(queries, rows, strict=True)
        ]

    def __call__(self, queries: Sequence[str], k: int | None = None) -> list[tuple[Document, ...]]:
        """Goes the whole way from texts to documents; all processes ask the same at the same time."""
        ids, mask = self.tokenize(queries)
        params = place(self.params, whole_on(self._mesh))
        return self.search(queries, np.asarray(self._jitted(params, ids, mask)), k)

    def _on_device(self, vectors: Array) -> Array:
        """The k best of all parts, int32 [Q, k]."""
        axes, shape = self._mesh.axis_names, (vectors.shape[0], self.k)
        results = jax.ShapeDtypeStruct(shape, np.float32), jax.ShapeDtypeStruct(shape, np.int32)

        def on_host(part, *operand) -> tuple[np.ndarray, np.ndarray]:
            return self._search(int(part), np.concatenate([*map(np.asarray, operand)]).reshape(vectors.shape))

        found = jax.pure_callback(on_host, results, jax.lax.axis_index(axes), *pieces(vectors))
        distance, position = (jnp.concatenate(jax.lax.all_gather(x, axes), axis=1) for x in found)
        return jax.lax.sort((distance, position), dimension=1, num_keys=2)[1][:, : self.k]

    def _search(self, part: int, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Distances and positions in the corpus, [Q, k] both; a failure stands before all that others find."""
        first, index = self._parts[part]
        found, error = guarded(lambda: index.nearest(vectors, self.k), self._timeout)
        shape = (len(vectors), self.k)
        if error is not None:
            return np.full(shape, -np.inf, np.float32), np.full(shape, _FAILED, np.int32)
        positions, distances = found
        return distances.astype(np.float32), np.where(positions >= 0, positions + first, -1).astype(np.int32)
