"""The training step: it learns, compiles once for each shape, donates, splits over devices, and Muon gets matrices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from array_samples import TIED, random_batch, random_decoder, worst_difference
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jraggym.errors import InputError
from jraggym.models.critic import critic_specs
from jraggym.models.decoder import is_spec
from jraggym.objectives.forward import token_logprobs
from jraggym.objectives.sft import sft_loss
from jraggym.training import Optimization, Run, Step, fit, init_state


def sft(weights, batch, frozen, key):
    return sft_loss(token_logprobs(weights, TIED, batch), batch)


def quadratic(weights, batch, frozen, key):
    """A loss that compiles at once, for what does not depend on the objective."""
    loss = jnp.mean((weights["w"] - batch.reward.mean()) ** 2) + 0.0 * frozen
    return loss, {"loss": loss}


SMALL = {"w": np.arange(6, dtype=np.float32).reshape(1, 2, 3)}


def placeholders():
    """The critic's weights without their values: enough for an optimiser's state."""
    return jax.tree.map(lambda spec: jax.ShapeDtypeStruct(spec.shape, np.float32), critic_specs(TIED), is_leaf=is_spec)


# ---------------------------------------------------------------- the step


def test_steps_reduce_the_loss_and_leave_the_given_weights_alone():
    weights, batch = random_decoder(), random_batch()
    before = jax.tree.map(np.copy, weights)
    optimization = Optimization(steps=30, rate=1e-2, matrix_rate=2e-2, warmup=3)
    optimizer = optimization.build()
    state, step, losses = init_state(weights, optimizer), Step(sft, optimizer), []
    for _ in range(30):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.5 * losses[0], losses
    assert int(state.step) == 30
    assert float(metrics["gradient_norm"]) > 0
    assert worst_difference(weights, before) == 0.0
    moved = jax.tree.map(lambda x, y: float(np.abs(x - y).max()), before, state.weights)
    assert min(jax.tree.leaves(moved)) > 1e-3, "every weight must learn"


def test_one_compilation_for_each_batch_shape():
    traced = []

    def counted(weights, batch, frozen, key):
        traced.append(batch.reward.shape)
        return quadratic(weights, batch, frozen, key)

    optimizer = optax.sgd(0.1)
    state, step = init_state(SMALL, optimizer), Step(counted, optimizer)
    for seed, rows in enumerate((2, 2, 3, 2, 3)):
        state, _ = step(state, random_batch(seed, rows=rows), jnp.float32(seed))
    assert traced == [(2, 4), (3, 4)]
    assert step.compilations == 2


def test_the_state_is_donated():
    optimizer = Optimization(steps=4).build()
    given = {"w": jnp.asarray(SMALL["w"])}
    old = init_state(given, optimizer)
    new, _ = Step(quadratic, optimizer)(old, random_batch(), jnp.float32(0))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old) if leaf.ndim), "a step must reuse the state's memory"
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(new))
    assert not given["w"].is_deleted(), "the caller's weights are copied first"


def test_frozen_weights_are_read_and_get_no_gradient():
    def objective(weights, batch, frozen, key):
        loss = jnp.mean((weights["w"] - frozen["w"]) ** 2)
        return loss, {"loss": loss}

    optimizer, frozen = optax.sgd(1.0), {"w": jnp.full((1, 2, 3), 7.0)}
    state, step = init_state(SMALL, optimizer), Step(objective, optimizer)
    for _ in range(40):
        state, _ = step(state, random_batch(), frozen)
    np.testing.assert_allclose(state.weights["w"], 7.0, atol=1e-3)
    assert np.array_equal(frozen["w"], np.full((1, 2, 3), 7.0))


# ---------------------------------------------------------------- devices


def test_eight_devices_give_the_same_as_one():
    assert jax.device_count() >= 8, "conftest sets eight fake devices"
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:8])
    split, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    optimizer, batches = optax.sgd(0.5), [random_batch(seed, rows=8, candidates=2, action=3) for seed in range(3)]
    one = init_state(random_decoder(), optimizer)
    many = jax.device_put(init_state(random_decoder(), optimizer), whole)
    step = Step(sft, optimizer)
    for batch in batches:
        one, expected = step(one, batch)
        many, found = step(many, jax.device_put(batch, split))
        assert abs(float(found["loss"]) - float(expected["loss"])) < 1e-5
        assert abs(float(found["gradient_norm"]) - float(expected["gradient_norm"])) < 1e-5
    assert worst_difference(one.weights, many.weights) < 1e-5
    assert len(many.weights.embed.sharding.device_set) == 8


# ---------------------------------------------------------------- the optimiser


def moments(optimizer, weights):
    """(names of weights under Muon, names of weights under AdamW), read from the shapes of their moments."""
    state = jax.eval_shape(optimizer.init, weights)
    paths = [jax.tree_util.keystr(path) for path, leaf in jax.tree_util.tree_leaves_with_path(state) if leaf.ndim]
    muon = {path.split(".mu.")[1] for path in paths if "'muon'" in path and ".mu." in path}
    return muon, {path.split(".nu.")[1] for path in paths if ".nu." in path}


def test_matrices_of_layers_go_to_muon_and_the_rest_to_adamw():
    muon, adam = moments(Optimization(steps=10).build(), placeholders())
    assert muon == {f"trunk.layers.{name}" for name in ("q", "k", "v", "o", "gate", "up", "down")}
    assert adam == {
        *("trunk.embed", "trunk.final_norm", "head"),
        *(f"trunk.layers.{name}" for name in ("attention_norm", "mlp_norm", "q_bias", "k_bias", "v_bias")),
    }


def test_without_a_matrix_rate_everything_is_under_adamw():
    muon, adam = moments(Optimization(steps=10, matrix_rate=0.0).build(), placeholders())
    assert not muon
    assert len(adam) == 15


def test_muon_takes_each_layer_as_a_matrix_of_its_own():
    optimizer = Optimization(steps=10, matrix_rate=1.0, warmup=0, clip=1e9).build()
    scale = np.array([1.0, 1e-3, 10.0])[:, None, None]  # layers of one stack with very different gradients
    gradient = {"w": np.float32(scale * np.random.default_rng(0).normal(size=(3, 6, 9)))}
    update = jax.jit(lambda g: optimizer.update(g, optimizer.init(g), g)[0])(gradient)
    values = np.linalg.svd(np.asarray(update["w"]), compute_uv=False)
    assert (values / values.mean()).min() > 0.5, "an orthogonalised update has singular values of about one"
    assert (values / values.mean()).max() < 1.6


def test_the_rate_warms_up_and_ends_at_zero():
    optimizer = Optimization(steps=20, matrix_rate=0.0, rate=0.1, warmup=5).build()
    weights = {"w": jnp.ones(3)}
    update, state, sizes = jax.jit(optimizer.update), optimizer.init(weights), []
    for _ in range(21):
        change, state = update({"w": jnp.full(3, 0.5)}, state, weights)
        sizes.append(float(-change["w"][0]))
    assert sizes[0] == 0.0
    np.testing.assert_allclose(sizes[1:6], 0.1 * np.arange(1, 6) / 5, rtol=1e-3)
    assert (np.diff(sizes[5:]) < 0).all()
    assert sizes[20] == pytest.approx(0.0, abs=1e-8)


# ---------------------------------------------------------------- the loop


class Rewards:
    """Batch `step` is a function of the step alone; counts which ones were asked for."""

    def __init__(self):
        self.asked = []

    def __getitem__(self, step):
        self.asked.append(step)
        return random_batch(step)


@functools.cache
def by_hand():
    optimization = Optimization(steps=6, matrix_rate=0.0, rate=0.1)
    optimizer = optimization.build()
    state, step = init_state(SMALL, optimizer), Step(quadratic, optimizer)
    for i in range(6):
        state, _ = step(state, random_batch(i), jnp.float32(0))
    return optimization, state.weights


def test_fit_is_the_step_over_the_batches_in_order():
    optimization, expected = by_hand()
    batches, seen = Rewards(), []
    weights = fit(Run(quadratic, optimization, batches, jnp.float32(0)), SMALL, report=lambda i, m: seen.append((i, m)))
    assert worst_difference(weights, expected) == 0.0
    assert batches.asked == list(range(6))
    assert [i for i, _ in seen] == [1, 2, 3, 4, 5, 6]
    assert set(seen[0][1]) == {"loss", "gradient_norm"}


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step():
    run = Run(quadratic, Optimization(steps=6), Rewards(), jnp.float32(np.nan))
    with pytest.raises(InputError, match=r"diverged at step 1, on batch 0; got .*loss.* not finite"):
        fit(run, SMALL, every=2)
