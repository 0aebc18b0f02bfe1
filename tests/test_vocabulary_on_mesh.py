"""Log-probabilities and scores on a mesh, where each device reads the vocabulary for its own tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jraggym.models.critic import critic_specs
from jraggym.models.decoder import DecoderConfig, init, specs
from jraggym.objectives.forward import candidate_scores, token_logprobs, token_logprobs_and_entropy
from jraggym.sharding import batch_sharding, make_mesh, place, shardings
from jraggym.text.batching import Row, collate

CONFIG = DecoderConfig(vocab=64, model=16, layers=1, query_heads=2, kv_heads=2, head_dim=8, feed_forward=32)

MESHES = [(1, 8, 1), (2, 2, 2), (1, 4, 2)]


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)

    def row():
        actions = [rng.integers(1, 64, size).tolist() for size in (4, 2)]
        masks = [(rng.random(len(a)) < 0.7).tolist() for a in actions]
        return Row(rng.integers(1, 64, 5).tolist(), actions, masks, [1.0, 0.0], [True, True])

    return collate([row() for _ in range(8)], prompt=6, action=4, candidates=2)


@pytest.mark.parametrize("sizes", MESHES)
def test_logprobs_and_gradients_are_those_of_one_device(batch, sizes):
    table = specs(CONFIG)
    weights, mesh = init(table, jax.random.key(0)), make_mesh(*sizes)

    def loss(weights, batch, mesh):
        logprob, entropy = token_logprobs_and_entropy(weights, CONFIG, batch, mesh=mesh)
        return jnp.sum(logprob * batch.reward[:, :, None]) + 0.1 * jnp.sum(entropy), (logprob, entropy)

    run = jax.jit(jax.grad(loss, has_aux=True), static_argnums=2)
    one, (logprob, entropy) = run(weights, batch, None)
    there = place(weights, shardings(table, mesh)), place(batch, batch_sharding(mesh)), mesh
    many, (logprob_there, entropy_there) = run(*there)
    np.testing.assert_allclose(logprob_there, logprob, atol=1e-5)
    np.testing.assert_allclose(entropy_there, entropy, atol=1e-5)
    for a, b in zip(jax.tree.leaves(many), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_critic_scores_are_those_of_one_device(batch):
    table, mesh = critic_specs(CONFIG, likelihood=True), make_mesh(2, 2, 2)
    weights = init(table, jax.random.key(1))
    run = jax.jit(candidate_scores, static_argnums=(1, 3))
    there = run(place(weights, shardings(table, mesh)), CONFIG, place(batch, batch_sharding(mesh)), mesh)
    np.testing.assert_allclose(there, run(weights, CONFIG, batch, None), atol=1e-5)


def test_more_own_tokens_than_the_capacity_are_never_cut_silently(batch):
    table, mesh = specs(CONFIG), make_mesh(1, 8, 1)
    weights = place(init(table, jax.random.key(0)), shardings(table, mesh))
    run = jax.jit(token_logprobs, static_argnums=(1, 3, 4))
    there = place(batch, batch_sharding(mesh))
    assert bool(jnp.isnan(run(weights, CONFIG, there, 1, mesh)).any())
    assert not bool(jnp.isnan(run(weights, CONFIG, there, 8, mesh)).any())
