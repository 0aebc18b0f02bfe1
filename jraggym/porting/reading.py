"""Safetensors of a Hugging Face checkpoint into our trees of stacked weights, straight onto the devices.

The host never holds more than one tensor of a file: each is read slice by slice for the devices that want it, and
transposed and stacked there.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from safetensors import SafetensorError, safe_open

from jraggym.errors import InputError
from jraggym.porting.pieces import Piece, pieces
from jraggym.sharding import shardings

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = ("F32", "BF16", "F16")  # safetensors' names
_SHOWN = 12  # names listed of each kind


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of one safetensors file, or of several with an index."""

    folder: Path
    files: Mapping[str, Path]  # of each tensor
    shapes: Mapping[str, tuple[int, ...]]

    @classmethod
    def open(cls, folder: str | Path, single: str = SINGLE) -> Checkpoint:
        """Reads the headers; raises InputError for missing or damaged files and for types that are no floats."""
        files: dict[str, Path] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        dtypes: dict[str, str] = {}
        for path in _files(Path(folder), single):
            with _opened(path) as file:
                for name in file.keys():  # noqa: SIM118
                    piece = file.get_slice(name)
                    files[name], shapes[name], dtypes[name] = path, tuple(piece.get_shape()), piece.get_dtype()
        if strange := [f"{name} {dtype}" for name, dtype in dtypes.items() if dtype not in DTYPES]:
            remedy = f"Use weights of {', '.join(DTYPES)}; quantized ones cannot be trained."
            raise InputError(f"tensors of an unknown type in {folder}", got=_some(strange), remedy=remedy)
        return cls(Path(folder), files, shapes)


def read_weights(
    checkpoint: Checkpoint,
    table: Any,
    names: Any,
    *,
    mesh: Mesh | None = None,
    dtype: str = "float32",
    unused: Iterable[str] = (),
) -> Any:
    """Fills a tree of `Spec` from a checkpoint, straight into the table's sharding on `mesh`.

    Args:
      names: a tree like `table` whose leaves are `TensorName`s.
      dtype: of the result.
      unused: names that may be in the checkpoint and are not read.

    Raises InputError that lists missing, unexpected and mis-shaped tensors, each with both sides.
    """
    wanted = pieces(table, names)
    _compare(checkpoint, wanted, set(unused))
    found = [_read(checkpoint, piece, mesh, dtype) for piece in wanted]
    return jax.tree.unflatten(jax.tree.structure(names), found)


def _files(folder: Path, single: str) -> list[Path]:
    if (folder / single).is_file():
        return [folder / single]
    index = folder / INDEX
    if not index.is_file():
        got = f"neither {single} nor {INDEX}"
        remedy = "Name a folder with safetensors files; convert others with transformers' save_pretrained."
        raise InputError(f"no weights in {folder}", got=got, remedy=remedy)
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(f"cannot read {index}", got=error, remedy="Copy the folder again.") from error
    if elsewhere := [str(name) for name in names if not isinstance(name, str) or Path(name).name != name]:
        raise InputError(f"{index} leads out of its folder", got=_some(elsewhere), remedy="Do not use it.")
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise InputError(f"{index} names missing files", got=_some(missing), remedy="Copy the folder again.")
    return [folder / name for name in names]


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="np")
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot read {path}", got=error, remedy="Copy the file again.") from error


def _compare(checkpoint: Checkpoint, wanted: list[Piece], unused: set[str]) -> None:
    expected = {name: piece.shape for piece in wanted for name in piece.names}
    found = checkpoint.shapes
    problems = {
        "missing": [f"{name} {shape}" for name, shape in expected.items() if name not in found],
        "unexpected": [f"{n} {shape}" for n, shape in found.items() if n not in expected and n not in unused],
        "mis-shaped": [f"{n} is {found[n]}, not {s}" for n, s in expected.items() if found.get(n, s) != s],
    }
    if told := [f"{len(names)} {what}: {_some(names)}" for what, names in problems.items() if names]:
        remedy = "Use the weights that belong to this configuration."
        raise InputError(f"the tensors in {checkpoint.folder} do not fit", got="; ".join(told), remedy=remedy)


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _read(checkpoint: Checkpoint, piece: Piece, mesh: Mesh | None, dtype: str) -> Array:
    """One leaf, layer by layer: each lands on its devices and is stacked there before the next is read."""
    kind = jnp.dtype(dtype)
    whole: Any = SingleDeviceSharding(jax.local_devices()[0])
    incoming = whole
    if mesh is not None:
        whole = shardings(piece.spec, mesh)
        axes = (*whole.spec, *[None] * len(piece.spec.shape))[: len(piece.spec.shape)]
        incoming = NamedSharding(mesh, PartitionSpec(*piece.turned(axes[1:] if piece.stacked else axes)))
    if not piece.stacked:
        turn = jax.jit(lambda x: piece.ours(x).astype(kind), out_shardings=whole)
        return jax.block_until_ready(turn(_put(checkpoint, piece.names[0], incoming)))
    stack = jax.jit(lambda: jnp.zeros(piece.spec.shape, kind), out_shardings=whole)()

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=whole)
    def insert(stack: Array, layer: Array, new: Array) -> Array:
        return stack.at[layer].set(piece.ours(new).astype(kind))

    for layer, name in enumerate(piece.names):
        # Wait: a second tensor on its way would be a second one in host memory.
        stack = jax.block_until_ready(insert(stack, layer, _put(checkpoint, name, incoming)))
    return stack


def _put(checkpoint: Checkpoint, name: str, where: Any) -> Array:
    """A tensor as it is on disk, of which this host reads the slices that its devices hold, each once."""
    with _opened(checkpoint.files[name]) as file:
        tensor = file.get_slice(name)
        kept: dict[tuple, np.ndarray] = {}

        def read(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            key = tuple((part.start, part.stop) for part in index)
            if key not in kept:
                kept[key] = tensor[index]
            return kept[key]

        return jax.make_array_from_callback(checkpoint.shapes[name], where, read)
