"""From weights and a ProcessBatch to what objectives read: log-probabilities and scores of every candidate.

All objectives share this forward. The prompt is computed once for its K candidates; the result equals that of
writing each candidate out behind its own copy of the prompt.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from jraggym.batch import ProcessBatch
from jraggym.models.critic import Critic, critic_scores
from jraggym.models.decoder import Decoder, DecoderConfig, branch_forward, prefix_forward, unembedding

CHUNK = 2048  # tokens whose logits [CHUNK, V] exist at one time


def branches(batch: ProcessBatch) -> tuple[Array, Array]:
    """Tokens and mask [B, K, A + 1] of the branches: the prompt's last token, then the action."""
    b, k, _, _ = batch.shape
    start = jnp.broadcast_to(batch.prompt[:, -1][:, None, None], (b, k, 1))
    tokens = jnp.concatenate([start, batch.action], axis=2)
    return tokens, jnp.concatenate([jnp.ones((b, k, 1), bool), batch.action_mask], axis=2)


def token_logprobs(weights: Decoder, config: DecoderConfig, batch: ProcessBatch, capacity: int | None = None) -> Array:
    """Log-probabilities [B, K, A] of the tokens in `loss_mask`, in nats, and 0 elsewhere.

    Only the states before such tokens meet the vocabulary matrix. `capacity` is a static upper bound on how many
    there are in the batch (default: all B * K * A positions); more than that gives NaN, never a silent cut.
    """
    prefix = prefix_forward(weights, config, batch.prompt, batch.prompt_mask)
    tokens, mask = branches(batch)
    hidden = branch_forward(weights, config, prefix, tokens, mask)[:, :, :-1]
    wanted = (batch.loss_mask & batch.action_mask).reshape(-1)
    size = min(capacity or wanted.size, wanted.size)
    (place,) = jnp.nonzero(wanted, size=size, fill_value=wanted.size)
    rows = hidden.reshape(-1, hidden.shape[-1]).at[place].get(mode="fill", fill_value=0)
    targets = jnp.ravel(batch.action).at[place].get(mode="fill", fill_value=0)
    found = chunked_logprobs(rows, unembedding(weights), targets)
    found = jnp.where(jnp.sum(wanted) <= size, found, jnp.nan)
    flat = jnp.zeros(wanted.size, jnp.float32).at[place].set(found, mode="drop")
    return flat.reshape(batch.action.shape)


def chunked_logprobs(hidden: Array, matrix: Array, targets: Array) -> Array:
    """log softmax(hidden @ matrix)[target] for hidden [T, D], matrix [D, V], targets int [T], without a [T, V] array.

    Chunks of logits are recomputed in the backward pass.
    """
    t, d = hidden.shape
    count = -(-t // CHUNK)
    size = -(-t // count)
    hidden = jnp.pad(hidden, ((0, count * size - t), (0, 0))).reshape(count, size, d)
    targets = jnp.pad(targets, (0, count * size - t)).reshape(count, size)
    matrix = matrix.astype(hidden.dtype)

    @jax.checkpoint
    def one(chunk: tuple[Array, Array]) -> Array:
        logits = (chunk[0] @ matrix).astype(jnp.float32)
        return jnp.take_along_axis(logits, chunk[1][:, None], axis=1)[:, 0] - jax.nn.logsumexp(logits, axis=1)

    return jax.lax.map(one, (hidden, targets)).reshape(-1)[:t]


def candidate_scores(weights: Critic, config: DecoderConfig, batch: ProcessBatch) -> Array:
    """Critic scores [B, K]."""
    prefix = prefix_forward(weights.trunk, config, batch.prompt, batch.prompt_mask)
    return critic_scores(weights, config, prefix, *branches(batch))
