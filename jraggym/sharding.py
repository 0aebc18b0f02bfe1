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
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

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
    """A mesh of data * fsdp * tensor devices, those of the job where no `devices` are given.

    Several TPU slices are parts of the data axis: between them goes least.

    Raises:
        InputError: a size is below 1, there are too few devices, or data is no multiple of the slices.
    """
    sizes, there = (data, fsdp, tensor), jax.device_count() if devices is None else len(devices)
    if min(sizes) < 1 or math.prod(sizes) > there:
        got = ", ".join(f"{axis}={size}" for axis, size in zip(MESH_AXES, sizes, strict=True))
        remedy = f"There are {there} devices: choose sizes whose product is at most that."
        raise InputError("the mesh does not fit the devices", got=got, remedy=remedy)
    if devices is None and jax.process_count() > 1 and math.prod(sizes) != there:
        got = f"{math.prod(sizes)} of {there} devices of {jax.process_count()} processes"
        raise InputError("several processes work on all of their devices", got=got, remedy="Enlarge --devices.data.")
    chosen = list(jax.devices() if devices is None else devices)[: math.prod(sizes)]
    # An axis may be a part of a torus' axis: 8 x 8 chips of a torus of 4 x 4 x 4.
    if (slices := _slices(chosen)) == 1:
        arranged = mesh_utils.create_device_mesh(sizes, chosen, allow_split_physical_axes=True)
    else:
        if data % slices:
            remedy = f"Give --devices.data {slices}, or a multiple."
            raise InputError(f"the data axis cannot be split over {slices} slices", got=f"data={data}", remedy=remedy)
        arranged = mesh_utils.create_hybrid_device_mesh(
            (data // slices, fsdp, tensor), (slices, 1, 1), devices=chosen, allow_split_physical_axes=True
        )
    return Mesh(np.asarray(arranged), MESH_AXES, axis_types=AXIS_TYPES)


def _slices(devices: Sequence[Any]) -> int:
    """How many TPU slices the devices belong to; others count as one."""
    return len({getattr(device, "slice_index", 0) if device.platform == "tpu" else 0 for device in devices})


def shardings(table: Any, mesh: Mesh) -> Any:
    """A tree of NamedSharding for a tree of specs, which have a `shape` and a logical name for each of its axes.

    Raises InputError for an axis that RULES does not know, and for one whose size is no multiple of its mesh axis.

    An axis "heads" of 128 on a mesh with tensor=2 gives each device 64.
    """
    return jax.tree_util.tree_map_with_path(lambda path, spec: _sharding(path, spec, mesh), table, is_leaf=_is_spec)


def place(tree: Any, shardings: Any) -> Any:
    """The arrays of `tree`, distributed by a tree of shardings of the same structure, or all by one.

    Of several processes each has the whole of an array, and takes from it what its own devices hold.
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)
    places = jax.tree.map(lambda _: shardings, tree) if isinstance(shardings, NamedSharding) else shardings
    return jax.tree.map(_put, tree, places)


def _put(leaf: Any, where: NamedSharding) -> jax.Array:
    if where.is_fully_addressable or (isinstance(leaf, jax.Array) and not leaf.is_fully_addressable):
        return jax.device_put(leaf, where)
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, where, lambda part: host[part])


def whole_on(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """The sharding of what every device of the mesh holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def own_rows(sharding: NamedSharding, rows: int) -> np.ndarray:
    """Which of `rows` rows lie on devices of this process, ascending; InputError when they cannot be split."""
    parts = _parts(sharding.mesh, sharding.spec[0])
    if rows % parts:
        raise InputError(
            "rows cannot be split over the mesh", got=f"{rows} rows, {parts} parts", remedy="Use a multiple."
        )
    held = sharding.addressable_devices_indices_map((rows,)).values()
    return np.unique(np.concatenate([np.arange(rows)[part] for part in held]))


def place_rows(tree: Any, sharding: NamedSharding, rows: int) -> Any:
    """Distributes arrays whose leading axis is rows of a batch of `rows`: each process gives its `own_rows` alone."""
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)
    own = own_rows(sharding, rows)

    def put(leaf: np.ndarray) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(rows)
            return leaf[np.searchsorted(own, start) :][: stop - start]

        return jax.make_array_from_callback((rows, *leaf.shape[1:]), sharding, part)

    return jax.tree.map(put, tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """How everything with a leading batch axis is spread: split over "data" and "fsdp", repeated over "tensor"."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def keep_rows(x: jax.Array, mesh: Mesh | None) -> jax.Array:
    """x [rows, ...], spread as a batch is, in a program on a mesh; rows that cannot be split stay as XLA has them.

    Said of a layer's input, it makes each device gather the layer's weights for its own rows. Left to itself, XLA may
    gather everybody's activations instead, and add up partial products of them all.
    """
    if mesh is None or mesh.size == 1 or x.shape[0] % batch_shards(mesh):
        return x
    return jax.lax.with_sharding_constraint(x, batch_sharding(mesh))


def batch_shards(mesh: Mesh) -> int:
    """Into how many parts the rows of a batch are split."""
    return _parts(mesh, RULES["batch"])


def replica_axes(mesh: Mesh) -> tuple[str, ...]:
    """The axes along which the rows of a batch are repeated."""
    return tuple(axis for axis in mesh.axis_names if axis not in (RULES["batch"] or ()) and mesh.shape[axis] > 1)


def split_over(mesh: Mesh | None, rows: int) -> int:
    """At least so many rows, as a multiple of the parts that a batch is split into."""
    parts = 1 if mesh is None else batch_shards(mesh)
    return -(-rows // parts) * parts


def _parts(mesh: Mesh | AbstractMesh, where: str | tuple[str, ...] | None) -> int:
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
