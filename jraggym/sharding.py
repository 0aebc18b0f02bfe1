"""Where arrays live on a mesh: one table from the logical axes of weights to the axes of the mesh.

data     rows of the batch
fsdp     rows of the batch too, and the model width of every matrix, gathered when used (fully sharded data parallelism)
tensor   attention heads, feed-forward width and vocabulary (Megatron-LM, arXiv 1909.08053)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jraggym.errors import InputError

MESH_AXES = ("data", "fsdp", "tensor")
# Auto: under Explicit, the default, a lookup in a sharded embedding table is refused.
AXIS_TYPES = (AxisType.Auto,) * len(MESH_AXES)

RULES: Mapping[str, str | tuple[str, ...] | None] = {
    "vocab": "tensor",
    "model": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "feed_forward": "tensor",
    "layer": None,
    "batch": ("data", "fsdp"),
}


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of data * fsdp * tensor devices; InputError when a size is below 1 or there are too few devices.

    `devices` are those of this machine where none are given.
    """
    sizes, there = (data, fsdp, tensor), jax.device_count() if devices is None else len(devices)
    if min(sizes) < 1 or math.prod(sizes) > there:
        got = ", ".join(f"{axis}={size}" for axis, size in zip(MESH_AXES, sizes, strict=True))
        remedy = f"There are {there} devices: choose sizes whose product is at most that."
        raise InputError("the mesh does not fit the devices", got=got, remedy=remedy)
    chosen = list(jax.devices() if devices is None else devices)[: math.prod(sizes)]
    # An axis may be a part of a torus' axis: 8 x 8 chips of a torus of 4 x 4 x 4.
    return mesh_of(mesh_utils.create_device_mesh(sizes, chosen, allow_split_physical_axes=True))


def mesh_of(devices: np.ndarray) -> Mesh:
    """The mesh of devices [data, fsdp, tensor] that were arranged already."""
    return Mesh(devices, MESH_AXES, axis_types=AXIS_TYPES)


def shardings(table: Any, mesh: Mesh) -> Any:
    """A tree of NamedSharding for a tree of specs, which have a `shape` and a logical name for each of its axes.

    Raises InputError for an axis that RULES does not know, and for one whose size is no multiple of its mesh axis.

    An axis "heads" of 128 on a mesh with tensor=2 gives each device 64.
    """
    return jax.tree_util.tree_map_with_path(lambda path, spec: _sharding(path, spec, mesh), table, is_leaf=_is_spec)


def place(tree: Any, shardings: Any) -> Any:
    """The arrays of `tree`, distributed by a tree of shardings of the same structure."""
    return jax.device_put(tree, shardings)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """How everything with a leading batch axis is spread: split over "data" and "fsdp", repeated over "tensor"."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def batch_shards(mesh: Mesh) -> int:
    """Into how many parts the rows of a batch are split."""
    return _parts(mesh, RULES["batch"])


def _parts(mesh: Mesh, where: str | tuple[str, ...] | None) -> int:
    return math.prod(mesh.shape[axis] for axis in (where if isinstance(where, tuple) else (where,)) if axis)


def _is_spec(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and hasattr(leaf, "axes")


def _sharding(path: tuple, spec: Any, mesh: Mesh) -> NamedSharding:
    name = jax.tree_util.keystr(path, simple=True, separator=".")
    if unknown := [axis for axis in spec.axes if axis is not None and axis not in RULES]:
        raise InputError(f"unknown axis of {name}", got=", ".join(unknown), remedy=f"Use one of {', '.join(RULES)}.")
    placed = [None if axis is None else RULES[axis] for axis in spec.axes]
    for size, axis, where in zip(spec.shape, spec.axes, placed, strict=True):
        if size % _parts(mesh, where):
            raise InputError(
                f"axis {axis!r} of {name} cannot be split over {where}={_parts(mesh, where)}",
                got=f"size {size}",
                remedy=f"Choose a mesh whose {where} divides it.",
            )
    return NamedSharding(mesh, PartitionSpec(*placed))
