"""The table from logical to mesh axes, and that placed weights compute the same."""

from dataclasses import dataclass
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from jraggym.errors import InputError
from jraggym.models.critic import critic_scores, critic_specs
from jraggym.models.decoder import DecoderConfig, branch_forward, init, prefix_forward, specs
from jraggym.sharding import MESH_AXES, RULES, batch_sharding, batch_shards, make_mesh, place, shardings

CONFIG = DecoderConfig(vocab=32, model=16, layers=2, query_heads=4, kv_heads=2, head_dim=8, feed_forward=32)
SHAPES = [(8, 1, 1), (1, 8, 1), (4, 1, 2), (2, 2, 2), (1, 2, 4)]


def test_the_table_knows_every_axis_of_every_weight():
    table = (critic_specs(CONFIG), specs(DecoderConfig(tied=False, qkv_bias=False)))
    leaves = jax.tree.leaves(table, is_leaf=lambda leaf: hasattr(leaf, "axes"))
    assert {axis for spec in leaves for axis in spec.axes if axis} | {"batch"} == set(RULES)
    places = {where if isinstance(where, tuple) else (where,) for where in RULES.values() if where}
    assert {axis for place in places for axis in place} == set(MESH_AXES)
    for spec in leaves:
        placed = [RULES[axis] for axis in spec.axes if axis and RULES[axis]]
        assert len(placed) == len(set(placed)), f"{spec.axes} would be split over one mesh axis twice"


def test_a_mesh_has_named_auto_axes():
    mesh = make_mesh(2, 2, 2)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert make_mesh().size == 1


@pytest.mark.parametrize("sizes", [(16, 1, 1), (3, 3, 1), (0, 1, 1), (2, -1, 2)])
def test_a_mesh_that_does_not_fit_is_refused(sizes):
    with pytest.raises(InputError, match=rf"the mesh does not fit the devices; got data={sizes[0]}.*There are 8"):
        make_mesh(*sizes)


@dataclass(frozen=True)
class Chip:
    """What arranging devices reads of a TPU."""

    id: int
    coords: tuple[int, ...]
    slice_index: int
    process_index: int = 0
    core_on_chip: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v5"


CHIPS = [Chip(64 * s + i, (i % 4, i // 4 % 4, i // 16), s) for s in range(2) for i in range(64)]


@pytest.mark.parametrize("tensor", [1, 2, 4, 8])
def test_slices_are_parts_of_the_data_axis(tensor):
    mesh = make_mesh(4, 32 // tensor, tensor, devices=CHIPS)
    assert mesh.devices.shape == (4, 32 // tensor, tensor)
    assert [{chip.slice_index for chip in part.flat} for part in mesh.devices] == [{0}, {0}, {1}, {1}]


def test_a_data_axis_that_slices_do_not_divide_is_refused():
    with pytest.raises(InputError, match=r"over 2 slices; got data=1\. Give --devices.data 2"):
        make_mesh(1, 128, 1, devices=CHIPS)
    assert make_mesh(1, 64, 1, devices=CHIPS).size == 64  # of the first slice alone


@pytest.mark.parametrize("shape", SHAPES)
def test_each_device_holds_its_part(shape):
    mesh, (_, fsdp, tensor) = make_mesh(*shape), shape
    config = DecoderConfig(vocab=64, model=16, query_heads=8, kv_heads=8, head_dim=8, feed_forward=64, tied=False)
    table = specs(config)
    weights = place(init(table, jax.random.key(0)), shardings(table, mesh))

    def part(leaf):
        return leaf.sharding.shard_shape(leaf.shape)

    assert part(weights.embed) == (64 // tensor, 16 // fsdp)
    assert part(weights.layers.q) == (2, 16 // fsdp, 64 // tensor)
    assert part(weights.layers.k_bias) == (2, 64 // tensor)
    assert part(weights.layers.down) == (2, 64 // tensor, 16 // fsdp)
    assert part(weights.layers.mlp_norm) == (2, 16)
    assert part(weights.unembed) == (16 // fsdp, 64 // tensor)


def test_absent_weights_stay_absent():
    table = specs(DecoderConfig(qkv_bias=False))
    placed = shardings(table, make_mesh())
    assert placed.unembed is None
    assert placed.layers.q_bias is None


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 1, 2), r"axis 'vocab' of embed cannot be split over tensor=2; got size 33\. Choose a mesh"),
        ((1, 4, 1), r"axis 'model' of embed cannot be split over fsdp=4; got size 18"),
    ],
)
def test_an_axis_that_does_not_divide_is_refused_by_name(shape, message):
    with pytest.raises(InputError, match=message):
        shardings(specs(DecoderConfig(vocab=33, model=18)), make_mesh(*shape))


def test_the_name_leads_to_the_weight():
    config = DecoderConfig(vocab=32, query_heads=3, kv_heads=3, head_dim=6, feed_forward=64)
    with pytest.raises(
        InputError, match=r"axis 'heads' of trunk\.layers\.q cannot be split over tensor=4; got size 18"
    ):
        shardings(critic_specs(config), make_mesh(1, 1, 4))


def test_any_record_with_shape_and_axes_is_a_spec():
    table = {"w": SimpleNamespace(shape=(8, 6), axes=("batch", None)), "x": SimpleNamespace(shape=(2,), axes=("size",))}
    with pytest.raises(InputError, match=r"unknown axis of x; got size\. Use one of vocab, model"):
        shardings(table, make_mesh(8))
    found = shardings({"w": table["w"]}, make_mesh(8))
    assert found["w"].spec == PartitionSpec(("data", "fsdp"), None)


@pytest.mark.parametrize("shape", [(4, 1, 2), (2, 2, 2), (1, 4, 2)])
def test_rows_are_split_over_data_and_fsdp_and_repeated_over_tensor(shape):
    mesh = make_mesh(*shape)
    rows = place(np.arange(8), batch_sharding(mesh))
    parts = [tuple(np.asarray(shard.data)) for shard in rows.addressable_shards]
    assert sorted(parts) == sorted([(i, i + 1) for i in (0, 2, 4, 6)] * 2)
    assert batch_shards(mesh) == 4


# ---------------------------------------------------------------- the same numbers


@jax.jit
def forward(critic, prompt, mask, tokens, tokens_mask):
    prefix = prefix_forward(critic.trunk, CONFIG, prompt, mask)
    hidden = branch_forward(critic.trunk, CONFIG, prefix, tokens, tokens_mask)
    return hidden, critic_scores(critic, CONFIG, prefix, tokens, tokens_mask)


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    critic = init(critic_specs(CONFIG), jax.random.key(1))
    prompt, tokens = rng.integers(32, size=(8, 7)), rng.integers(32, size=(8, 3, 4))
    mask = np.arange(7) >= rng.integers(0, 5, size=(8, 1))
    tokens_mask = np.arange(4) < rng.integers(1, 5, size=(8, 3, 1))
    inputs = tuple(map(jnp.asarray, (prompt, mask, tokens, tokens_mask)))
    return critic, inputs, forward(critic, *inputs)


@pytest.mark.parametrize("shape", [(4, 1, 2), (2, 2, 2), (1, 8, 1)])
def test_placed_weights_compute_the_same(case, shape):
    critic, inputs, expected = case
    mesh = make_mesh(*shape)
    placed = place(critic, shardings(critic_specs(CONFIG), mesh))
    found = forward(placed, *place(inputs, batch_sharding(mesh)))
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(placed)} == {8}
    for name, ours, theirs in zip(("hidden states", "scores"), found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5, err_msg=f"{name} on a {shape} mesh")
