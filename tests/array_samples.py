"""Small random batches, and an independent dense decoder for plain sequences, each with its own copy of the prompt.

The dense decoder shares nothing with the library but the weights' names: a loop over layers, a complex rotation for
the positions, one full causal softmax, no cache, no scan, no masks. It runs in numpy (float64) where weights are numpy
arrays, and in jax where gradients are wanted.
"""

from typing import Any

import jax
import numpy as np

from jraggym.batch import ProcessBatch
from jraggym.models.critic import Critic, critic_specs
from jraggym.models.decoder import Decoder, DecoderConfig, Spec, is_spec, specs

TIED = DecoderConfig(
    vocab=29, model=16, layers=2, query_heads=4, kv_heads=2, head_dim=6, feed_forward=24, rope_theta=100.0
)
UNTIED = DecoderConfig(
    vocab=29, model=16, layers=2, query_heads=3, kv_heads=3, head_dim=4, feed_forward=24, tied=False, qkv_bias=False
)


def random_weights(table, seed=0):
    """numpy weights for a table of specs, with gains that are not all one; drawing them compiles nothing."""
    rng = np.random.default_rng(seed)

    def draw(spec: Spec):
        noise = rng.normal(size=spec.shape)
        return np.float32(spec.scale * noise if spec.scale else 1 + 0.1 * noise)

    return jax.tree.map(draw, table, is_leaf=is_spec)


def random_decoder(config=TIED, seed=0) -> Any:
    return random_weights(specs(config), seed)


def random_critic(config=TIED, seed=0) -> Any:
    weights = random_weights(critic_specs(config), seed)
    return weights.replace(head=20 * weights.head)  # scores of about one, so that the loss is not flat


def random_batch(seed=0, rows=3, candidates=4, prompt=7, action=5, vocab=29) -> Any:
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
    fields: dict[str, Any] = {
        "prompt": rng.integers(0, vocab, (rows, prompt), dtype=np.int32),
        "prompt_mask": np.arange(prompt) >= prompt - lengths[:, None],
        "action": rng.integers(0, vocab, (rows, candidates, action), dtype=np.int32),
        "action_mask": action_mask,
        "loss_mask": action_mask & ~holes,
        "reward": reward.astype(np.float32),
        "candidate_mask": real,
        "behaviour_logprob": np.zeros((rows, candidates, action), np.float32),
    }
    return ProcessBatch(**fields)


# ---------------------------------------------------------------- the independent decoder


def causal_hidden(weights: Decoder, config: DecoderConfig, ids):
    """Normalised last hidden states [..., T, D] of sequences [..., T]; padding on their right changes nothing."""
    x = weights.embed[ids] * np.sqrt(config.model)
    xp = x.__array_namespace__()
    for n in range(config.layers):
        layer = jax.tree.map(lambda leaf, n=n: leaf[n], weights.layers)
        y = _normalise(x, layer.attention_norm, config)
        q, k, v = (_heads(y, getattr(layer, name), getattr(layer, f"{name}_bias"), config) for name in "qkv")
        k, v = (xp.repeat(z, config.query_heads // config.kv_heads, axis=-3) for z in (k, v))
        scores = _rotate(q, config) @ _rotate(k, config).swapaxes(-1, -2) / np.sqrt(config.head_dim)
        mixed = _softmax(xp.where(np.tri(ids.shape[-1], dtype=bool), scores, -np.inf)) @ v
        x = x + mixed.swapaxes(-2, -3).reshape(*ids.shape, -1) @ layer.o
        y = _normalise(x, layer.mlp_norm, config)
        gate = y @ layer.gate
        x = x + (gate / (1 + xp.exp(-gate)) * (y @ layer.up)) @ layer.down
    return _normalise(x, weights.final_norm, config)


def causal_logprobs(weights: Decoder, config: DecoderConfig, ids):
    """Log-probabilities [..., T, V] of the token after each of ids [..., T]."""
    logits = causal_hidden(weights, config, ids) @ (weights.embed.T if config.tied else weights.unembed)
    return logits - logits.__array_namespace__().log(_total(logits))


def _heads(x, matrix, bias, config):
    """x [..., T, D] times a matrix [D, heads * H], as [..., heads, T, H]."""
    y = x @ matrix if bias is None else x @ matrix + bias
    return y.reshape(*y.shape[:-1], -1, config.head_dim).swapaxes(-2, -3)


def _normalise(x, gain, config):
    return x / ((x * x).mean(-1, keepdims=True) + config.norm_eps) ** 0.5 * gain


def _total(scores):
    return scores.__array_namespace__().exp(scores).sum(-1, keepdims=True)


def _softmax(scores):
    return scores.__array_namespace__().exp(scores) / _total(scores)


def _rotate(x, config):
    t, h = x.shape[-2:]
    xp = x.__array_namespace__()
    angle = np.arange(t)[:, None] * config.rope_theta ** (-np.arange(h // 2) * 2 / h)
    turned = (x[..., : h // 2] + 1j * x[..., h // 2 :]) * np.exp(1j * angle)
    return xp.concatenate([turned.real, turned.imag], axis=-1)


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


def copied_logprobs(weights: Decoder, config: DecoderConfig, batch: ProcessBatch):
    """Log-probabilities [B, K, A] of every action token from the copied layout (anything where there is none)."""
    ids, lengths = copied(batch)
    b, k, _, a = batch.shape
    before = np.broadcast_to((lengths[:, None] + np.arange(a) - 1)[:, None], (b, k, a))
    rows, columns = np.ogrid[:b, :k]
    return causal_logprobs(weights, config, ids)[rows[..., None], columns[..., None], before, batch.action]


def copied_scores(weights: Critic, config: DecoderConfig, batch: ProcessBatch):
    """Critic scores [B, K] from the copied layout: the last real token's hidden state times the head."""
    ids, lengths = copied(batch)
    last = lengths[:, None] + np.asarray(batch.action_mask).sum(2) - 1
    rows, columns = np.ogrid[: ids.shape[0], : ids.shape[1]]
    return causal_hidden(weights.trunk, config, ids)[rows, columns, last] @ weights.head


def worst_difference(left, right) -> float:
    """The largest absolute difference between two trees of arrays of the same structure; NaN counts as infinite."""
    differences = jax.tree.map(lambda x, y: np.max(np.abs(np.asarray(x) - np.asarray(y)), initial=0.0), left, right)
    return max(float(np.nan_to_num(d, nan=np.inf)) for d in jax.tree.leaves(differences))
