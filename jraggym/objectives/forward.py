"""From weights and a ProcessBatch to what objectives read: log-probabilities, values and scores of every candidate.

All objectives share this forward. The prompt is computed once for its K candidates; the result equals that of
writing each candidate out behind its own copy of the prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from jraggym.batch import ProcessBatch
from jraggym.errors import InputError
from jraggym.models.critic import Critic, scores_of_hidden
from jraggym.models.decoder import Decoder, DecoderConfig, branch_forward, prefix_forward, unembedding
from jraggym.models.likelihood import chunked_logprobs, chunked_logprobs_and_entropy, on_rows
from jraggym.models.packed import packed_forward


def branches(batch: ProcessBatch) -> tuple[Array, Array]:
    """Tokens and mask [B, K, A + 1] of the branches: the prompt's last token, then the action."""
    b, k, _, _ = batch.shape
    start = jnp.broadcast_to(batch.prompt[:, -1][:, None, None], (b, k, 1))
    tokens = jnp.concatenate([start, batch.action], axis=2)
    return tokens, jnp.concatenate([jnp.ones((b, k, 1), bool), batch.action_mask], axis=2)


def token_logprobs(
    weights: Decoder,
    config: DecoderConfig,
    batch: ProcessBatch,
    capacity: int | None = None,
    mesh: Mesh | None = None,
) -> Array:
    """Log-probabilities [B, K, A] of the tokens in `loss_mask`, in nats, and 0 elsewhere.

    Only the states before such tokens meet the vocabulary matrix. `capacity` is a static upper bound on how many
    there are in the batch, and on a mesh in each device's part (default: all B * K * A positions); more than that
    gives NaN, never a silent cut. `mesh` is where batch and weights lie.
    """
    return _read_tokens(chunked_logprobs, weights, config, batch, capacity, mesh)


def token_logprobs_and_entropy(
    weights: Decoder,
    config: DecoderConfig,
    batch: ProcessBatch,
    capacity: int | None = None,
    mesh: Mesh | None = None,
) -> tuple[Array, Array]:
    """The same, and the entropy [B, K, A] of the distribution that each of these tokens is drawn from, in nats."""
    return _read_tokens(chunked_logprobs_and_entropy, weights, config, batch, capacity, mesh)


def token_values(weights: Critic, config: DecoderConfig, batch: ProcessBatch, mesh: Mesh | None = None) -> Array:
    """Values [B, K, A] of the states in which the action tokens are chosen: head . hidden(all tokens before)."""
    hidden = _hidden(weights.trunk, config, batch, mesh)[:, :, :-1]
    return (hidden @ weights.head.astype(hidden.dtype)).astype(jnp.float32)


def candidate_scores(weights: Critic, config: DecoderConfig, batch: ProcessBatch, mesh: Mesh | None = None) -> Array:
    """Critic scores [B, K]."""
    return scores_of_hidden(weights, config, _hidden(weights.trunk, config, batch, mesh), *branches(batch), mesh)


def by_rows(forward: Callable[[Any, ProcessBatch], Any], weights: Any, batch: ProcessBatch, parts: int) -> Any:
    """forward(weights, batch) computed on `parts` slices of the batch's rows, one after the other.

    A slice's activations are recomputed in the backward pass, so that only one slice's exist at a time, and the loss
    that reads the result is that of the whole batch, whatever it averages over. That is gradient accumulation without
    its usual error of averaging means. Slice j takes rows j, parts + j, ..., which leaves each device its own rows.
    Raises InputError when the rows cannot be split.
    """
    rows = batch.prompt.shape[0]
    if rows % parts:
        got = f"{rows} rows in {parts} parts"
        raise InputError("the batch cannot be split evenly", got=got, remedy="Choose a divisor of the rows.")
    if parts == 1:
        return forward(weights, batch)

    def split(x: Array) -> Array:
        return x.reshape(rows // parts, parts, *x.shape[1:]).swapaxes(0, 1)

    @jax.checkpoint
    def one(part: ProcessBatch) -> Any:
        return forward(weights, part)

    found = jax.lax.map(one, jax.tree.map(split, batch))
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(rows, *x.shape[2:]), found)


def _hidden(weights: Decoder, config: DecoderConfig, batch: ProcessBatch, mesh: Mesh | None) -> Array:
    """Hidden states [B, K, A + 1, D]: of the prompt's last token, then of the action's tokens."""
    if config.attention != "xla":
        return packed_forward(weights, config, batch.prompt, batch.prompt_mask, *branches(batch), mesh=mesh)
    prefix = prefix_forward(weights, config, batch.prompt, batch.prompt_mask, mesh)
    return branch_forward(weights, config, prefix, *branches(batch), mesh)


def _read_tokens(
    read: Callable,
    weights: Decoder,
    config: DecoderConfig,
    batch: ProcessBatch,
    capacity: int | None,
    mesh: Mesh | None,
):
    hidden = _hidden(weights, config, batch, mesh)[:, :, :-1]

    def of_tokens(matrix: Array, hidden: Array, own: Array, action: Array) -> Any:
        wanted = own.reshape(-1)
        size = min(capacity or wanted.size, wanted.size)
        (place,) = jnp.nonzero(wanted, size=size, fill_value=wanted.size)
        rows = hidden.reshape(-1, hidden.shape[-1]).at[place].get(mode="fill", fill_value=0)
        targets = jnp.ravel(action).at[place].get(mode="fill", fill_value=0)

        def back(found: Array) -> Array:
            found = jnp.where(jnp.sum(wanted) <= size, found, jnp.nan)
            flat = jnp.zeros(wanted.size, jnp.float32).at[place].set(found, mode="drop")
            return flat.reshape(action.shape)

        return jax.tree.map(back, read(rows, matrix, targets, config.final_cap))

    b, k, a = batch.action.shape
    tokens = (hidden, batch.loss_mask & batch.action_mask, batch.action)
    flat = (x.reshape(b, k * a, *x.shape[3:]) for x in tokens)
    found = on_rows(of_tokens, mesh)(unembedding(weights).astype(hidden.dtype), *flat)
    return jax.tree.map(lambda x: x.reshape(b, k, a), found)
