"""Calls from a jitted program to methods of a host object, on each shard of the rows for its own ones.

A host object is asked by name, with the step of the loop and the rows. Of the replicas of a shard one asks, and tells
the others over the device: they may be on other hosts. Asked again, the object gives the same result (`Once`). jax must
not be called inside: it would wait for the very program that waits here.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from jraggym.preemption import stop_if_asked
from jraggym.sharding import batch_sharding, replica_axes

Results = tuple[jax.ShapeDtypeStruct, ...]
Rows = Sequence[int] | np.ndarray

# Bytes of a callback's operand. JAX hands operands over as arrays of its own, and those above 100 KB are filled by
# the very threads that wait in the callbacks: with as many devices as threads, none is left to do it.
PIECE = 1 << 16


class HostCalls:
    """The calls of one program; `results(name, b)` says what method `name` returns for b rows.

    With a `mesh` the program calls for all rows; one that is itself in a shard_map calls for its own, and needs none.
    """

    def __init__(self, results: Callable[[str, int], Results], mesh: Mesh | None = None):
        self._results, self._mesh = results, mesh
        self._host: Any = None
        self._failure: Exception | None = None
        self._after: Callable[[str], None] = lambda name: None

    def run(self, host: Any, program: Callable[[], Any], after: Callable[[str], None] | None = None) -> Any:
        """program() with `host` to call; `after` gets each method's name behind its call.

        Raises what a method raised, when the program has ended.
        """
        self._host, self._failure, self._after = host, None, after or (lambda name: None)
        found = jax.block_until_ready(program())
        if self._failure is not None:
            raise self._failure
        return found

    def __call__(self, name: str, step: Array, rows: Array, *arrays: Array) -> Any:
        """Inside the program: host.<name>(step, rows, *arrays)."""

        copies = () if self._mesh is None else replica_axes(self._mesh)

        def on_shard(step: Array, rows: Array, *arrays: Array) -> Any:
            results = self._results(name, rows.shape[0])
            on_host = partial(self._on_host, name, results, [x.shape for x in arrays])
            replica = jax.lax.axis_index(copies) if copies else jnp.int32(0)
            # Flat, since JAX lowers results of different ranks for TPUs to a module that its verifier refuses.
            flat = tuple(jax.ShapeDtypeStruct((math.prod(x.shape),), x.dtype) for x in results)
            found = jax.pure_callback(on_host, flat, replica, step, rows, *map(pieces, arrays))
            whole = tuple(x.reshape(result.shape) for x, result in zip(found, results, strict=True))
            return tuple(jax.lax.all_gather(x, copies)[0] for x in whole) if copies else whole

        if self._mesh is None:
            return on_shard(step, rows, *arrays)
        sharded, whole = batch_sharding(self._mesh).spec, PartitionSpec()
        inputs = (whole, sharded, *(sharded for _ in arrays))
        return jax.shard_map(on_shard, mesh=self._mesh, in_specs=inputs, out_specs=sharded, check_vma=False)(
            step, rows, *arrays
        )

    def _on_host(self, name: str, results: Results, shapes: Sequence[tuple], replica, step, rows, *pieces) -> Any:
        """Puts the operands together again and calls the method.

        A failure is kept for `run` to raise, and every row closes: an exception here would leave other shards waiting.
        """
        if self._failure is None and not replica:
            try:
                stop_if_asked()
                arrays = [np.concatenate([*map(np.asarray, p)]).reshape(s) for p, s in zip(pieces, shapes, strict=True)]
                result = getattr(self._host, name)(int(step), np.asarray(rows), *arrays)
                self._after(name)
                return tuple(np.ravel(x) for x in result)
            except Exception as failure:
                self._failure = self._failure or failure
        return tuple(np.zeros(math.prod(result.shape), result.dtype) for result in results)


class Once:
    """Does the work of each call once, and gives its result to all that ask.

    All results are kept: a compiler may repeat a call, and doing the work again would move the episodes on.
    """

    def __init__(self) -> None:
        self._results: dict[tuple[str, int, int], Any] = {}
        self._locks: dict[tuple[str, int, int], threading.Lock] = {}
        self._guard = threading.Lock()  # of _locks

    def __call__(self, call: str, step: int, rows: Rows, work: Callable[[], Any]) -> Any:
        key = (call, int(step), int(rows[0]))
        with self._guard:
            lock = self._locks.setdefault(key, threading.Lock())
        with lock:  # one for each shard: none waits for another's retriever
            if key not in self._results:
                self._results[key] = work()
            return self._results[key]


def pieces(x: Array) -> list[Array]:
    """The array as flat pieces of at most `PIECE` bytes."""
    return jnp.array_split(x.reshape(-1), max(1, -(-x.size * x.dtype.itemsize // PIECE)))
