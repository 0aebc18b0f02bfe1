"""The jitted steps: every objective on a mesh equals one device, micro-batches equal the whole, LoRA, and dropout."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from array_samples import TIED, random_batch, random_critic, random_decoder, worst_difference

from jraggym import steps
from jraggym.errors import InputError
from jraggym.models.critic import critic_specs
from jraggym.models.decoder import DecoderConfig, init, is_spec, specs
from jraggym.models.lora import Lora, adapt, lora_specs, merge
from jraggym.objectives.forward import by_rows, token_logprobs, token_logprobs_and_entropy, token_values
from jraggym.objectives.policy import Experience, PolicyLoss
from jraggym.sharding import batch_sharding, make_mesh, place, shardings
from jraggym.steps import Network
from jraggym.training import Step, init_state

CONFIG = DecoderConfig(vocab=32, model=16, layers=2, query_heads=4, kv_heads=2, head_dim=8, feed_forward=32)
LORA = Lora(rank=2, alpha=4.0)


@pytest.fixture(scope="module")
def batch():
    return random_batch(seed=3, rows=8, candidates=3, action=4)


@pytest.fixture(scope="module")
def experience(batch):
    rng = np.random.default_rng(0)
    noise = [rng.normal(size=batch.action.shape).astype(np.float32) for _ in range(4)]
    old = -3 + noise[0]
    return Experience(
        batch.replace(behaviour_logprob=old + 0.1), noise[1], old, old + 0.3 * noise[2], noise[3], noise[0]
    )


def objectives(net):
    """Each objective by name, and whether it trains a critic."""
    how = PolicyLoss(kl_weight=0.1, entropy_weight=0.01, dual_clip=3.0, truncate=2.0)
    return {
        "sft": (steps.sft(net), False),
        "weighted sft": (steps.sft(net, weighted=True), False),
        "dpo": (steps.dpo(net, beta=0.3), False),
        "critic": (steps.critic(net, listwise=1.0, pointwise=0.5), True),
        "policy": (steps.policy(net, how), False),
        "value": (steps.value(net), True),
    }


def data_for(name, batch, experience):
    return experience if name in ("policy", "value") else batch


# ---------------------------------------------------------------- devices


MESHES = [*((name, (2, 2, 2)) for name in ("sft", "dpo", "critic", "value")), ("policy", (1, 4, 2)), ("dpo", (8, 1, 1))]


@pytest.mark.parametrize(("name", "shape"), MESHES)
def test_every_objective_on_a_mesh_equals_one_device_and_compiles_once(batch, experience, name, shape):
    objective, is_critic = objectives(Network(CONFIG))[name]
    table = critic_specs(CONFIG) if is_critic else specs(CONFIG)
    weights, frozen, data = init(table, jax.random.key(1)), init(specs(CONFIG), jax.random.key(2)), None
    data, mesh, optimizer = data_for(name, batch, experience), make_mesh(*shape), optax.sgd(0.3, momentum=0.9)
    step = Step(objective, optimizer)
    one = init_state(weights, optimizer)
    spread_step = Step(objective, optimizer)
    many = init_state(place(weights, shardings(table, mesh)), optimizer)
    spread_frozen = place(frozen, shardings(specs(CONFIG), mesh))
    for _ in range(2):
        one, expected = step(one, data, frozen)
        many, found = spread_step(many, place(data, batch_sharding(mesh)), spread_frozen)
        for metric, value in expected.items():
            assert float(found[metric]) == pytest.approx(float(value), abs=2e-5, rel=2e-5), metric
    assert worst_difference(one.weights, many.weights) < 2e-5
    assert spread_step.compilations == 1, "a step must not be compiled again for its own result"
    where = {leaf.sharding for leaf in jax.tree.leaves(many.optimizer[0].trace)}
    assert where == {leaf.sharding for leaf in jax.tree.leaves(many.weights)}, "moments lie where their weights lie"


# ---------------------------------------------------------------- micro-batches


@pytest.mark.parametrize("name", list(objectives(Network(TIED))))
def test_micro_batches_equal_the_whole_batch(batch, experience, name):
    data = data_for(name, batch, experience)
    weights, frozen = random_decoder(seed=1), random_decoder(seed=2)
    found = []
    for parts in (1, 4):
        objective, is_critic = objectives(Network(TIED, parts=parts))[name]
        given = jax.tree.map(jnp.asarray, random_critic() if is_critic else weights)
        run = jax.jit(jax.value_and_grad(objective, has_aux=True))
        found.append(run(given, data, frozen, jax.random.key(0)))
    (whole, gradient), (parted, other) = found
    assert float(whole[0]) == pytest.approx(float(parted[0]), abs=1e-5)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient)) > 1e-3
    assert worst_difference(gradient, other) < 1e-5


def test_rows_that_cannot_be_split_are_refused(batch):
    with pytest.raises(InputError, match="split evenly; got 8 rows in 3 parts"):
        by_rows(lambda w, b: b.reward, None, batch, 3)
    back = by_rows(lambda w, b: w * b.reward, 2.0, jax.tree.map(jnp.asarray, batch), 4)
    assert worst_difference(back, 2 * batch.reward) == 0.0


# ---------------------------------------------------------------- what is read


def test_entropy_is_that_of_the_full_distribution(batch):
    weights = random_decoder()
    logprob, entropy = jax.jit(token_logprobs_and_entropy, static_argnums=1)(weights, TIED, batch)
    plain = jax.jit(token_logprobs, static_argnums=1)(weights, TIED, batch)
    assert worst_difference(logprob, plain) < 1e-6
    wanted = np.zeros(batch.action.shape)
    for token in range(TIED.vocab):  # -sum p log p, one vocabulary entry at a time
        other = batch.replace(action=np.full_like(batch.action, token))
        # the context of position a is the true action's, so only the first position can be read off
        found = np.asarray(jax.jit(token_logprobs, static_argnums=1)(weights, TIED, other))
        wanted -= np.exp(found) * found
    first = batch.loss_mask[..., 0]
    np.testing.assert_allclose(np.asarray(entropy)[..., 0][first], wanted[..., 0][first], atol=1e-5)
    assert not np.asarray(entropy)[~(batch.loss_mask & batch.action_mask)].any()


def test_a_value_sees_only_what_stands_before_its_token(batch):
    critic = random_critic()
    run = jax.jit(token_values, static_argnums=1)
    before = np.asarray(run(critic, TIED, batch))
    action = batch.action.copy()
    action[..., 2:] = (action[..., 2:] + 5) % TIED.vocab
    after = np.asarray(run(critic, TIED, batch.replace(action=action)))
    np.testing.assert_allclose(before[..., :3], after[..., :3], atol=1e-6)
    assert np.abs(before[..., 3] - after[..., 3])[batch.action_mask[..., 3]].min() > 1e-4


def test_a_kept_reference_is_used_and_equals_the_computed_one(batch):
    net, weights, frozen = Network(TIED), random_decoder(seed=1), random_decoder(seed=2)
    kept = batch.replace(reference_logprob=np.asarray(net.reference(frozen, batch)))
    objective = jax.jit(steps.dpo(net))
    with_frozen, with_kept = (objective(weights, b, f, None)[0] for b, f in ((batch, frozen), (kept, None)))
    assert float(with_frozen) == pytest.approx(float(with_kept), abs=1e-6)
    with pytest.raises(ValueError, match="reads a frozen decoder"):
        steps.dpo(net)(weights, batch, None, None)


# ---------------------------------------------------------------- LoRA


@pytest.fixture(scope="module")
def adapters():
    """With a B that is not zero, so that the adapters act."""
    made = init(lora_specs(CONFIG, LORA), jax.random.key(4))
    return jax.tree.map(lambda x: x + 0.05 * jax.random.normal(jax.random.key(5), x.shape), made)


def test_fresh_adapters_change_nothing_and_dpo_starts_at_log_two(batch):
    base = init(specs(CONFIG), jax.random.key(1))
    fresh = init(lora_specs(CONFIG, LORA), jax.random.key(4))
    objective = jax.jit(jax.value_and_grad(steps.dpo(Network(CONFIG, LORA)), has_aux=True))
    (loss, _), gradient = objective(fresh, batch, base, jax.random.key(0))
    assert float(loss) == pytest.approx(np.log(2), abs=1e-6)
    assert {name: set(pair) for name, pair in gradient.items()} == {n: {"a", "b"} for n in ("q", "k", "v", "o")}
    assert all(float(jnp.abs(pair["b"]).max()) > 1e-6 for pair in gradient.values())


def test_an_adapted_decoder_equals_the_merged_one(batch, adapters):
    base = init(specs(CONFIG), jax.random.key(1))
    run = jax.jit(token_logprobs, static_argnums=1)
    adapted = run(adapt(base, adapters, LORA), CONFIG, batch)
    merged = run(merge(base, adapters, LORA), CONFIG, batch)
    assert worst_difference(adapted, merged) < 1e-5
    assert worst_difference(adapted, run(base, CONFIG, batch)) > 1e-2
    full = np.asarray(merge(base, adapters, LORA).layers.q - base.layers.q)
    pair = adapters["q"]
    np.testing.assert_allclose(full[1], 2.0 * np.asarray(pair["a"][1] @ pair["b"][1]), atol=1e-6)


def test_the_gradient_of_the_adapters_is_that_of_the_merged_weights(batch, adapters):
    base = init(specs(CONFIG), jax.random.key(1))

    def loss(decoder):
        return jnp.sum(token_logprobs(decoder, CONFIG, batch) ** 2) * 1e-3

    found = jax.jit(jax.grad(lambda pairs: loss(adapt(base, pairs, LORA))))(adapters)
    expected = jax.jit(jax.grad(lambda pairs: loss(merge(base, pairs, LORA))))(adapters)
    assert worst_difference(found, expected) < 1e-4


def test_dropout_is_on_only_with_a_key_and_differs_by_key(batch, adapters):
    base, lora = init(specs(CONFIG), jax.random.key(1)), dataclasses.replace(LORA, dropout=0.5)
    run = jax.jit(lambda key: token_logprobs(adapt(base, adapters, lora, key), CONFIG, batch))
    first, again, other = run(jax.random.key(1)), run(jax.random.key(1)), run(jax.random.key(2))
    assert worst_difference(first, again) == 0.0
    assert worst_difference(first, other) > 1e-4
    still = token_logprobs(adapt(base, adapters, lora), CONFIG, batch)
    assert worst_difference(still, token_logprobs(adapt(base, adapters, LORA), CONFIG, batch)) == 0.0


def test_a_critic_with_adapters_trains_its_head_too(batch):
    base = init(specs(CONFIG), jax.random.key(1))
    critic = init(dataclasses.replace(critic_specs(CONFIG), trunk=lora_specs(CONFIG, LORA)), jax.random.key(2))
    objective = jax.jit(jax.grad(lambda *args: steps.critic(Network(CONFIG, LORA))(*args)[0]))
    gradient = objective(critic, batch, base, jax.random.key(0))
    assert float(jnp.abs(gradient.head).max()) > 1e-4
    assert set(gradient.trunk) == {"q", "k", "v", "o"}


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"leaves": ("q", "attention_norm")}, "LoRA on no matrix; got attention_norm. Use some of q, k, v, o, gate"),
        ({"rank": 0}, "adapters of rank 0"),
        ({"rank": -1}, "rank >= 0"),
        ({"dropout": 1.0}, "dropout < 1"),
    ],
)
def test_a_lora_that_cannot_be_is_refused(how, message):
    with pytest.raises(InputError, match=message):
        lora_specs(CONFIG, Lora(**how))


def test_adapters_have_a_place_on_a_mesh():
    mesh, table = make_mesh(2, 2, 2), lora_specs(CONFIG, LORA)
    placed = place(init(table, jax.random.key(0)), shardings(table, mesh))
    assert placed["q"]["a"].sharding.shard_shape(placed["q"]["a"].shape) == (2, 8, 2)
    assert placed["q"]["b"].sharding.shard_shape(placed["q"]["b"].shape) == (2, 2, 16)
    assert not np.asarray(placed["q"]["b"]).any()
    assert all(is_spec(leaf) for leaf in jax.tree.leaves(table, is_leaf=is_spec))
