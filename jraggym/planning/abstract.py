"""Weights and batches as abstract arrays: shapes and places on a mesh, with nothing in memory."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jraggym.batch import ProcessBatch
from jraggym.errors import InputError
from jraggym.models.decoder import DecoderConfig, is_spec
from jraggym.sharding import batch_sharding, batch_shards, shardings
from jraggym.text.batching import EMPTY_ROW, collate

# What sets the rows of a batch: of demonstrations, of stored states, of fresh groups.
_ROWS = "--settings.tokens (SFT without --data), --settings.states or --schedule.rows"


def abstract_weights(table: Any, mesh: Mesh) -> Any:
    """Float32 weights of a tree of specs, where `shardings` places them."""
    where = shardings(table, mesh)
    return jax.tree.map(
        lambda s, at: jax.ShapeDtypeStruct(s.shape, jnp.float32, sharding=at), table, where, is_leaf=is_spec
    )


def spread(tree: Any, mesh: Mesh) -> Any:
    """The shapes of arrays whose rows are split over the mesh; they must be a multiple of its shards."""
    where, shards = batch_sharding(mesh), batch_shards(mesh)
    rows = jax.tree.leaves(tree)[0].shape[0]
    if rows % shards:
        remedy = f"Choose a multiple with {_ROWS}, or another mesh."
        raise InputError(f"rows cannot be split over data * fsdp = {shards}", got=rows, remedy=remedy)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree)


def check_parts(rows: int, parts: int, mesh: Mesh) -> None:
    """Raises InputError where a micro-batch cannot be split over the mesh."""
    shards = batch_shards(mesh)
    if rows % (parts * shards):
        got = f"{rows} rows in {parts} parts over {shards} shards"
        remedy = f"Lower --parts, or add rows with {_ROWS}."
        raise InputError("a micro-batch cannot be split over the mesh", got=got, remedy=remedy)


def empty_batch(rows: int, prompt: int, action: int, candidates: int) -> ProcessBatch:
    """A batch of such sizes, as training collates it."""
    return collate([EMPTY_ROW] * rows, prompt=prompt, action=action, candidates=candidates)


def cache_bytes(config: DecoderConfig, rows: int, prompt: int, action: int, mesh: Mesh) -> int:
    """Bytes on each device of the keys and values of `rows` prompts and of `action` tokens behind each."""
    heads = -(-config.kv_heads // mesh.shape["tensor"])
    each = 2 * config.layers * heads * config.head_dim * jnp.dtype(config.dtype).itemsize
    return each * (rows // batch_shards(mesh)) * (prompt - 1 + action)
