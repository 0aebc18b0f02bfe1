"""From weights and a ProcessBatch to what objectives read: log-probabilities and scores of every candidate.

All objectives share this forward. The prompt is computed once for its K candidates; the result equals that of
writing each candidate out behind its own copy of the prompt.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from jraggym.batch import ProcessBatch
from jraggym.models.critic import Critic, critic_scores
from jraggym.models.decoder import Decoder, DecoderConfig, branch_forward, prefix_forward, unembedding
from jraggym.models.likelihood import chunked_logprobs


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


def candidate_scores(weights: Critic, config: DecoderConfig, batch: ProcessBatch) -> Array:
    """Critic scores [B, K]."""
    prefix = prefix_forward(weights.trunk, config, batch.prompt, batch.prompt_mask)
    return critic_scores(weights, config, prefix, *branches(batch))
