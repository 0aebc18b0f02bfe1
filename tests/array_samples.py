"""Small random batches and an independent dense decoder that runs one plain, unpadded, copied sequence at a time.

The dense decoder shares nothing with the library but the weights' names: a loop over layers and heads, a complex
rotation for the positions, one full causal softmax, no cache, no scan, no masks.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jraggym.batch import ProcessBatch
from jraggym.models.critic import Critic, critic_specs
from jraggym.models.decoder import Decoder, DecoderConfig, init, specs

TIED = DecoderConfig(
    vocab=29, model=16, layers=2, query_heads=4, kv_heads=2, head_dim=6, feed_forward=24, rope_theta=100.0
)
UNTIED = DecoderConfig(
    vocab=29, model=16, layers=2, query_heads=3, kv_heads=3, head_dim=4, feed_forward=24, tied=False, qkv_bias=False
)


def random_weights(table, seed=0):
    """Weights for a table of specs, with gains that are not all one."""
    weights = init(table, jax.random.key(seed))
    leaves, tree = jax.tree.flatten(weights)
    keys = jax.random.split(jax.random.key(seed + 100), len(leaves))
    return tree.unflatten(
        leaf + 0.1 * jnp.std(leaf) * jax.random.normal(key, leaf.shape) + 0.1 * (jnp.std(leaf) == 0)
        for leaf, key in zip(leaves, keys, strict=True)
    )


def random_decoder(config=TIED, seed=0) -> Decoder:
    return random_weights(specs(config), seed)


def random_critic(config=TIED, seed=0) -> Critic:
    weights = random_weights(critic_specs(config), seed)
    return weights.replace(head=20 * weights.head)  # scores of about one, so that the loss is not flat


def random_batch(seed=0, rows=3, candidates=4, prompt=7, action=5, vocab=29) -> ProcessBatch:
    """A batch with prompts and actions of all lengths, garbage ids in the padding, holes in the loss mask, masked
    candidates, and in every row at least one candidate above 0.75 and one below 0.5."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, prompt + 1, rows)
    lengths[0] = prompt
    sizes = rng.integers(1, action + 1, (rows, candidates))
    sizes[0, 0] = action
    action_mask = np.arange(action) < sizes[..., None]
    holes = rng.random((rows, candidates, action)) < 0.25
    holes[..., 0] = False
    reward = rng.choice([0.0, 0.25, 0.5, 0.6, 0.75, 0.8, 1.0], (rows, candidates))
    reward[:, 0], reward[:, 1] = 1.0, 0.0
    real = rng.random((rows, candidates)) < 0.8
    real[:, :2] = True
    return ProcessBatch(
        prompt=rng.integers(0, vocab, (rows, prompt), dtype=np.int32),
        prompt_mask=np.arange(prompt) >= prompt - lengths[:, None],
        action=rng.integers(0, vocab, (rows, candidates, action), dtype=np.int32),
        action_mask=action_mask,
        loss_mask=action_mask & ~holes,
        reward=reward.astype(np.float32),
        candidate_mask=real,
        behaviour_logprob=np.zeros((rows, candidates, action), np.float32),
    )


# ---------------------------------------------------------------- the independent decoder


def causal_hidden(weights: Decoder, config: DecoderConfig, ids):
    """Normalised last hidden states [T, D] of one sequence of ids [T]; padding on its right changes nothing."""
    x = weights.embed[ids] * np.sqrt(config.model)
    for n in range(config.layers):
        layer = jax.tree.map(lambda leaf, n=n: leaf[n], weights.layers)
        y = _normalise(x, layer.attention_norm, config)
        q, k, v = (_project(y, getattr(layer, name), getattr(layer, f"{name}_bias")) for name in "qkv")
        h, share = config.head_dim, config.query_heads // config.kv_heads
        heads = [_head(q, k, v, head * h, head // share * h, config) for head in range(config.query_heads)]
        x = x + jnp.concatenate(heads, axis=1) @ layer.o
        y = _normalise(x, layer.mlp_norm, config)
        x = x + (y @ layer.gate / (1 + jnp.exp(-(y @ layer.gate))) * (y @ layer.up)) @ layer.down
    return _normalise(x, weights.final_norm, config)


def _project(x, matrix, bias):
    return x @ matrix if bias is None else x @ matrix + bias


def _normalise(x, gain, config):
    return x / jnp.sqrt((x * x).mean(-1, keepdims=True) + config.norm_eps) * gain


def _head(q, k, v, at, shared_at, config):
    """One head's causal attention [T, H]; its queries start at column `at`, its keys and values at `shared_at`."""
    h, t = config.head_dim, q.shape[0]
    q, k, v = q[:, at : at + h], k[:, shared_at : shared_at + h], v[:, shared_at : shared_at + h]
    scores = _rotate(q, config) @ _rotate(k, config).T / np.sqrt(h)
    return jax.nn.softmax(jnp.where(np.tri(t, dtype=bool), scores, -np.inf), axis=1) @ v


def _rotate(x, config):
    t, h = x.shape
    angle = np.arange(t)[:, None] * config.rope_theta ** (-np.arange(h // 2) * 2 / h)
    turned = (x[:, : h // 2] + 1j * x[:, h // 2 :]) * np.exp(1j * angle)
    return jnp.concatenate([turned.real, turned.imag], axis=1)


# ---------------------------------------------------------------- the copied layout


def copied(batch: ProcessBatch):
    """Each (prompt, candidate) written out behind its own copy of the prompt.

    Returns ids [B, K, P + A], padded on the right, and the prompts' lengths [B].
    """
    b, k, p, a = batch.shape
    ids = np.zeros((b, k, p + a), np.int32)
    lengths = np.asarray(batch.prompt_mask).sum(1)
    for i, j in np.ndindex(b, k):
        real = [*batch.prompt[i][batch.prompt_mask[i]], *batch.action[i, j][batch.action_mask[i, j]]]
        ids[i, j, : len(real)] = real
    return ids, lengths


def copied_hidden(weights: Decoder, config: DecoderConfig, ids):
    """Hidden states [B, K, P + A, D] of the copied layout."""
    return jax.vmap(jax.vmap(lambda sequence: causal_hidden(weights, config, sequence)))(ids)


def copied_logprobs(weights: Decoder, config: DecoderConfig, batch: ProcessBatch):
    """Log-probabilities [B, K, A] of every action token from the copied layout (anything where there is none)."""
    ids, lengths = copied(batch)
    hidden = copied_hidden(weights, config, ids)
    logits = hidden @ (weights.embed.T if config.tied else weights.unembed)
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    b, k, _, a = batch.shape
    before = np.broadcast_to((lengths[:, None] + np.arange(a) - 1)[:, None], (b, k, a))
    rows, columns = np.ogrid[:b, :k]
    return logprobs[rows[..., None], columns[..., None], before, batch.action]


def copied_scores(weights: Critic, config: DecoderConfig, batch: ProcessBatch):
    """Critic scores [B, K] from the copied layout: the last real token's hidden state times the head."""
    ids, lengths = copied(batch)
    hidden = copied_hidden(weights.trunk, config, ids)
    last = lengths[:, None] + np.asarray(batch.action_mask).sum(2) - 1
    rows, columns = np.ogrid[: ids.shape[0], : ids.shape[1]]
    return hidden[rows, columns, last] @ weights.head


def worst_difference(left, right) -> float:
    """The largest absolute difference between two trees of arrays of the same structure; NaN counts as infinite."""
    differences = jax.tree.map(lambda x, y: np.max(np.abs(np.asarray(x) - np.asarray(y)), initial=0.0), left, right)
    return max(float(np.nan_to_num(d, nan=np.inf)) for d in jax.tree.leaves(differences))
