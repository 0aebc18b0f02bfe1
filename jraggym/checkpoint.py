"""Checkpoints: the training state and the data position, written so that a kill at any moment loses nothing.

    directory/120/   a whole checkpoint (orbax): `state` holds one array per leaf, named by its tree path,
                     and `index` holds the data position with every leaf's type, shape and checksum
    directory/140/   the newest one
    directory/160.orbax-checkpoint-tmp/   half-written by a killed job: never listed, cleared by the next save
    directory/180.damaged/   whole by its name and damaged inside: set aside by the restore that found it so

Array storage has no checksum of its own (a flipped bit in a weight would be restored without a word),
so each leaf gets one here, which does not depend on how the array is sharded.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from jraggym.errors import InputError

_SHOWN = 20  # differing leaves listed in one message
_LOG = logging.getLogger(__name__)


class _Damaged(InputError):
    """A checkpoint that does not give back what was saved; `got` says how that was seen."""

    def __init__(self, folder: Path, got: str, then: str):
        super().__init__(f"the checkpoint {folder} is damaged", got=got, remedy=f"Remove that folder and {then}.")
        self.got = got


@dataclass(frozen=True)
class Checkpointer:
    """Keeps the newest `keep` training states in `directory`; one job writes there at a time.

    The directory lies on a POSIX file system that all processes of the job see.
    """

    directory: str | Path
    keep: int = 2

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise InputError("a checkpointer keeps too few states", got=self.keep, remedy="Use keep=1 or more.")

    def steps(self) -> list[int]:
        """The steps with a whole checkpoint, in increasing order."""
        root = Path(self.directory)
        names = [path.name for path in root.iterdir() if path.is_dir()] if root.is_dir() else []
        return sorted(int(name) for name in names if name.isdecimal())

    def latest(self) -> int | None:
        """The newest step with a whole checkpoint, or None."""
        return max(self.steps(), default=None)

    def save(self, step: int, state: Any, data: Mapping[str, Any]) -> None:
        """Writes a pytree of `jax.Array`s (typed PRNG keys too) and `data` (JSON values); returns when it is on disk.

        Every process of the job calls this with the same step.

        Raises:
            InputError: a leaf is no jax array, `data` is no JSON, `step` is not after the latest one, or the
                directory cannot be written.
        """
        leaves = _leaves(state)
        if wrong := [path for path, leaf in leaves.items() if not isinstance(leaf, jax.Array)]:
            raise InputError("state leaves that are no jax arrays", got=", ".join(wrong), remedy="Use jnp.asarray.")
        if not any(leaf.size for leaf in leaves.values()):
            raise InputError("there is nothing to save", got="a state without arrays", remedy="Give the whole state.")
        latest = self.latest()
        if step < 0 or (latest is not None and step <= latest):
            raise InputError(
                f"checkpoint step {step} is not after the latest one in {self.directory}",
                got=latest,
                remedy="Save later steps only, use another folder, or remove the later steps first.",
            )
        index = _seal({"step": step, "data": _plain(data), "leaves": _describe(leaves)})
        try:
            self._write(step, leaves, index)
        except OSError as error:
            raise InputError(
                f"cannot write a checkpoint into {self.directory}",
                got=f"{type(error).__name__}: {error}",
                remedy="Give a folder that can be written and has room; older checkpoints there are untouched.",
            ) from error

    def _write(self, step: int, leaves: dict[str, jax.Array], index: dict[str, Any]) -> None:
        root = Path(self.directory).absolute()
        root.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            _clear_temporary(root)
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as writer:
            arrays = {path: leaf for path, leaf in leaves.items() if leaf.size}  # orbax writes no empty array
            items = {"state": ocp.args.StandardSave(arrays), "index": ocp.args.JsonSave(index)}
            writer.save(root / str(step), args=ocp.args.Composite(**items))
        if jax.process_index() == 0:
            # Renamed before it is removed: a kill in between never leaves half a checkpoint under a step's name.
            for old in self.steps()[: -self.keep]:
                (root / str(old)).rename(root / f"{old}{ocp.utils.TMP_DIR_SUFFIX}-removed")
            _clear_temporary(root)

    def restore(self, abstract_state: Any, step: int | None = None) -> tuple[Any, dict[str, Any]]:
        """Reads (state, data) of `step`, or of the newest whole checkpoint.

        Without a `step`, a damaged one is named in a warning, set aside under another name, and the one before it is
        read; where there is none before it, nothing is changed. Nothing is ever removed.

        Args:
            abstract_state: the tree to fill, of arrays or `jax.ShapeDtypeStruct`s; each leaf's sharding is where
                its array goes (without one: the first local device), whatever layout it was saved from.

        Raises:
            InputError: there is no such checkpoint, its leaves differ from the asked ones (all are compared by
                path, type and shape), or it is damaged.
        """
        steps, damaged = self.steps(), dict[int, _Damaged]()
        if not steps or (step is not None and step not in steps):
            raise InputError(
                f"no checkpoint {'at all' if step is None else f'of step {step}'} in {self.directory}",
                got=f"steps {steps}",
                remedy="Name the folder and one of the steps of an earlier run.",
            )
        if step is not None:
            return self._restore(step, abstract_state)
        for candidate in reversed(steps):
            try:
                found = self._restore(candidate, abstract_state)
            except _Damaged as error:
                damaged[candidate] = error
            else:
                self._set_aside(damaged, candidate)
                return found
        if len(damaged) == 1:
            raise damaged[steps[0]]
        got, remedy = "; ".join(map(str, damaged.values())), "Remove them all and start again."
        raise InputError(f"no checkpoint in {self.directory} is whole", got=got, remedy=remedy)

    def _restore(self, step: int, abstract_state: Any) -> tuple[Any, dict[str, Any]]:
        index = self._read_index(step)
        expected = _leaves(abstract_state)
        self._compare(step, expected, index["leaves"])
        found = self._read_state(step, {path: _target(leaf) for path, leaf in expected.items()})
        described = _describe(found)
        if wrong := [path for path in found if described[path] != index["leaves"][path]]:
            raise self._damaged(step, f"other bits than were saved in {', '.join(wrong[:_SHOWN])}")
        return jax.tree.unflatten(jax.tree.structure(abstract_state), list(found.values())), index["data"]

    def _set_aside(self, damaged: Mapping[int, _Damaged], used: int) -> None:
        """Takes their steps' names from damaged checkpoints, so that these steps can be saved anew."""
        for step, error in damaged.items():
            folder = Path(self.directory) / str(step)
            if jax.process_index() == 0:
                taken = len(list(folder.parent.glob(f"{step}.damaged*")))
                aside = folder.with_name(f"{step}.damaged" + (f"-{taken + 1}" if taken else ""))
                folder.rename(aside)
                what = "the checkpoint %s is damaged; got %s. It was set aside as %s, and step %d is used instead."
                _LOG.warning(what, folder, error.got, aside.name, used)
        if damaged and jax.process_count() > 1:
            multihost_utils.sync_global_devices("damaged checkpoints are set aside")

    def _compare(self, step: int, expected: Mapping[str, Any], found: Mapping[str, list[Any]]) -> None:
        sides = {path: (_spec(leaf), "nothing") for path, leaf in expected.items()}
        sides |= {path: (sides.get(path, ("nothing", ""))[0], spec) for path, (spec, _) in found.items()}
        lines = [f"{path}: expected {want}, found {have}" for path, (want, have) in sides.items() if want != have]
        if lines:
            more = f"; and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
            raise InputError(
                f"the checkpoint {Path(self.directory) / str(step)} is of another model or optimiser",
                got="; ".join(lines[:_SHOWN]) + more,
                remedy="Use the configuration it was saved with, or another folder.",
            )

    def _read_index(self, step: int) -> dict[str, Any]:
        index = self._read(step, index=ocp.args.JsonRestore())
        if not isinstance(index, dict) or index != _seal({k: v for k, v in index.items() if k != "digest"}):
            raise self._damaged(step, "an index with a wrong checksum")
        return index

    def _read_state(self, step: int, target: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        stored = {path: leaf for path, leaf in target.items() if leaf.size}
        found = self._agreed(step, lambda: self._read(step, state=ocp.args.StandardRestore(stored)))
        return {path: found[path] if path in stored else _empty(leaf) for path, leaf in target.items()}

    def _read(self, step: int, **item: Any) -> Any:
        """One item of a checkpoint. What a damaged file raises depends on the byte, so all but our own limits count."""
        try:
            with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
                restored = reader.restore(Path(self.directory).absolute() / str(step), args=ocp.args.Composite(**item))
                return restored[next(iter(item))]
        except (jax.errors.JaxRuntimeError, MemoryError, PermissionError):
            raise
        except Exception as error:
            raise self._damaged(step, f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}") from error

    def _agreed(self, step: int, read: Callable[[], Any]) -> Any:
        """What `read` gives, where no process met damage: each one reads its own part."""
        try:
            found, failure = read(), None
        except _Damaged as error:
            found, failure = None, error
        if jax.process_count() > 1 and multihost_utils.process_allgather(np.int32(failure is not None)).any():
            failure = failure or self._damaged(step, "damage that another process has met")
        if failure is not None:
            raise failure
        return found

    def _damaged(self, step: int, got: str) -> _Damaged:
        older = [other for other in self.steps() if other < step]
        then = f"go on from step {older[-1]}" if older else "start again, for there is no older one"
        return _Damaged(Path(self.directory) / str(step), got, then)


def _leaves(tree: Any) -> dict[str, Any]:
    """The leaves by path, in tree order: {"['params'].layer.q": leaf}."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _spec(leaf: Any) -> str:
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def _target(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _empty(leaf: jax.ShapeDtypeStruct) -> jax.Array:
    return jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)


def _describe(leaves: Mapping[str, jax.Array]) -> dict[str, list[Any]]:
    """{path: [type and shape, checksum]}, the same on every process."""
    sums = np.array([_checksum(leaf) for leaf in leaves.values()], np.uint32)
    if jax.process_count() > 1:  # each process has summed its own shards
        sums = multihost_utils.process_allgather(sums).sum(axis=0, dtype=np.uint32)
    return {path: [_spec(leaf), int(total)] for (path, leaf), total in zip(leaves.items(), sums, strict=True)}


def _checksum(leaf: jax.Array) -> int:
    """The sum of the elements' bits as unsigned integers, mod 2^32, over the shards this process holds.

    A sum is the same for every sharding, and one flipped bit always changes it. It runs on the host, where
    the array goes anyway to be written: on the device every shape would cost a compilation.
    """
    bits = jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
    total = 0
    for shard in bits.addressable_shards:
        if shard.replica_id == 0:
            flat = np.ascontiguousarray(shard.data).reshape(-1)
            total += int(flat.view(f"u{min(flat.itemsize, 4)}").sum(dtype=np.uint32))
    return total % 2**32


def _plain(data: Mapping[str, Any]) -> Any:
    try:
        return json.loads(json.dumps(dict(data), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise InputError("the data position is no JSON", got=error, remedy="Use plain finite values.") from error


def _seal(index: dict[str, Any]) -> dict[str, Any]:
    text = json.dumps(index, sort_keys=True)
    return {**index, "digest": hashlib.sha256(text.encode()).hexdigest()}


def _clear_temporary(root: Path) -> None:
    """Removes what killed jobs left: folders that never got, or no longer have, a step's plain name."""
    for path in root.glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*"):
        shutil.rmtree(path)
