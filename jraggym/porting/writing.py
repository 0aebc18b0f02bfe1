"""Our trees of stacked weights as safetensors, in one file or in shards with an index as transformers has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from jraggym.errors import InputError
from jraggym.porting.pieces import Piece, pieces
from jraggym.porting.reading import INDEX, SINGLE
from jraggym.preemption import stop_if_asked

SHARD_BYTES = 5_000_000_000  # transformers' own limit


def write_weights(
    folder: Path, weights: Any, table: Any, names: Any, *, dtype: str, single: str = SINGLE, limit: int = SHARD_BYTES
) -> None:
    """Writes a tree of weights in files of at most `limit` bytes (a larger tensor has a file of its own)."""
    wanted = pieces(table, names)
    leaves = jax.tree.leaves(weights)
    places = [(piece, leaf, i) for piece, leaf in zip(wanted, leaves, strict=True) for i in range(len(piece.names))]
    size = jnp.dtype(dtype).itemsize
    shards: list[list[int]] = [[]]
    room = limit
    for number, (piece, _, _) in enumerate(places):
        bytes_ = size * int(np.prod(piece.shape))
        if shards[-1] and bytes_ > room:
            shards.append([])
            room = limit
        shards[-1].append(number)
        room -= bytes_
    files, total = {}, 0
    for at, shard in enumerate(shards, 1):
        stop_if_asked()
        name = single if len(shards) == 1 else f"model-{at:05d}-of-{len(shards):05d}.safetensors"
        tensors = {places[i][0].names[places[i][2]]: _tensor(*places[i], dtype) for i in shard}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        files.update(dict.fromkeys(tensors, name))
        total += sum(tensor.nbytes for tensor in tensors.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": files}
        (folder / INDEX).write_text(json.dumps(index, indent=1))


def _tensor(piece: Piece, leaf: Any, layer: int, dtype: str) -> np.ndarray:
    own = jnp.asarray(leaf[layer] if piece.stacked else leaf)
    found = np.ascontiguousarray(jax.device_get(piece.theirs(own).astype(dtype)))
    if dtype == "float16" and not np.isfinite(found).all() and np.isfinite(own).all():
        raise InputError(f"{piece.names[layer]} does not fit float16", got="infinity", remedy="Use bfloat16.")
    return found
