"""The packed layout against prefix and branches: values and gradients, what sees what, meshes, and a TPU compiler."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from array_samples import TIED, UNTIED, random_batch, random_decoder, worst_difference
from jax.experimental import topologies
from jax.sharding import Mesh

from jraggym.errors import InputError
from jraggym.models.decoder import DecoderConfig, branch_forward, is_spec, prefix_forward, specs
from jraggym.models.packed import PackedMask, blocks, packed_forward
from jraggym.objectives.forward import branches
from jraggym.sharding import MESH_AXES, batch_sharding, make_mesh, place, shardings

BOTH = pytest.mark.parametrize("attention", ["splash", "cudnn"])
small_blocks = functools.partial(packed_forward, block=128)
forward = jax.jit(packed_forward, static_argnums=1)


def two_part(weights, config, prompt, prompt_mask, tokens, mask):
    return branch_forward(weights, config, prefix_forward(weights, config, prompt, prompt_mask), tokens, mask)


@functools.partial(jax.jit, static_argnums=(0, 2))
def run(forward, weights, config, batch):
    """Hidden states [B, K, A + 1, D] and a gradient by all weights to which every real token contributes."""
    tokens, mask = branches(batch)
    pull = jax.random.normal(jax.random.key(0), (*mask.shape, config.model)) * mask[..., None]

    def loss(w):
        hidden = forward(w, config, batch.prompt, batch.prompt_mask, tokens, mask)
        return 0.1 * jnp.sum(hidden * pull), hidden

    gradient, hidden = jax.grad(loss, has_aux=True)(weights)
    return hidden, gradient


def with_attention(config, attention, **changes):
    return dataclasses.replace(config, attention=attention, **changes)


def at_real(hidden, batch):
    return np.asarray(hidden)[np.asarray(branches(batch)[1])]


def assert_same(found, expected, batch):
    assert np.isfinite(found[0]).all(), "padding must stay finite"
    assert worst_difference(at_real(found[0], batch), at_real(expected[0], batch)) < 1e-5
    assert worst_difference(found[1], expected[1]) < 1e-5


@pytest.fixture(scope="module")
def batch():
    return random_batch(seed=5)


# ---------------------------------------------------------------- the same numbers as prefix and branches


@BOTH
@pytest.mark.parametrize("config", [TIED, UNTIED])
def test_values_and_every_gradient_equal_those_of_prefix_and_branches(config, attention, batch):
    weights = random_decoder(config)
    expected = run(two_part, weights, config, batch)
    read = jax.tree.leaves(expected[1].replace(unembed=None))
    assert min(float(np.abs(leaf).max()) for leaf in read) > 0.1, "a weight gets no gradient"
    assert_same(run(packed_forward, weights, with_attention(config, attention), batch), expected, batch)


def test_many_blocks_with_empty_ones_between():
    prompt, candidates, action = 150, 6, 70
    batch = random_batch(seed=6, rows=2, candidates=candidates, prompt=prompt, action=action)
    side, whole = blocks(prompt - 1 + candidates * (action + 1), 128)
    seen = np.reshape(PackedMask(whole, prompt - 1, action + 1)[:, :], (whole // side, side, whole // side, side))
    seen = seen.any((1, 3))
    assert seen.shape == (5, 5)
    assert np.tril(~seen).any(), "no block below the diagonal is empty"
    weights = random_decoder()
    found = run(small_blocks, weights, with_attention(TIED, "splash"), batch)
    assert_same(found, run(two_part, weights, TIED, batch), batch)


@BOTH
def test_a_prompt_of_one_token(attention):
    batch = random_batch(seed=7, rows=2)
    batch = batch.replace(prompt=batch.prompt[:, -1:], prompt_mask=batch.prompt_mask[:, -1:])
    tokens, mask = branches(batch)
    weights, inputs = random_decoder(), (batch.prompt, batch.prompt_mask, tokens, mask)
    found = forward(weights, with_attention(TIED, attention), *inputs)
    assert worst_difference(at_real(found, batch), at_real(two_part(weights, TIED, *inputs), batch)) < 1e-5


@pytest.mark.parametrize(("attention", "remat"), [("splash", "layer"), ("splash", "dots"), ("cudnn", "layer")])
def test_remat_changes_nothing(attention, remat, batch):
    weights = random_decoder()
    plain, other = (with_attention(TIED, attention, remat=r) for r in ("none", remat))
    inputs = batch.prompt, batch.prompt_mask, *branches(batch)
    traced = [str(jax.make_jaxpr(packed_forward, static_argnums=1)(weights, c, *inputs)) for c in (plain, other)]
    assert ["remat" in text for text in traced] == [False, True]
    found = [run(packed_forward, weights, config, batch) for config in (plain, other)]
    assert worst_difference(*found) < 1e-6


@BOTH
def test_bfloat16_activations(attention, batch):
    weights = random_decoder()
    config = with_attention(TIED, attention, dtype="bfloat16")
    rough = jax.jit(packed_forward, static_argnums=1)(
        weights, config, batch.prompt, batch.prompt_mask, *branches(batch)
    )
    assert rough.dtype == "bfloat16"
    rough, exact = (at_real(x, batch).astype(np.float32) for x in (rough, run(two_part, weights, TIED, batch)[0]))
    assert 0 < np.sqrt(np.mean((rough - exact) ** 2)) < 0.02 * np.std(exact)


# ---------------------------------------------------------------- what sees what


@pytest.mark.parametrize(("prefix", "branch", "candidates"), [(5, 3, 4), (0, 2, 3), (7, 1, 2)])
def test_the_mask_is_the_published_one(prefix, branch, candidates):
    names = [("prompt", i) for i in range(prefix)]
    names += [(k, i) for k in range(candidates) for i in range(branch)]
    expected = [[a[1] >= b[1] if a[0] == b[0] else b[0] == "prompt" for b in names] for a in names]
    length = len(names) + 3
    mask = PackedMask(length, prefix, branch)
    assert mask[:, :].shape == mask.shape == (length, length)
    assert mask[: len(names), : len(names)].tolist() == expected
    assert np.diagonal(mask[:, :]).all(), "a token that sees nothing has no softmax"
    assert (mask[2:5, 1:9] == mask[:, :][2:5, 1:9]).all()


def test_equal_masks_are_one_key():
    mask = PackedMask(256, 5, 3)
    assert mask == PackedMask(256, 5, 3)
    assert hash(mask) == hash(PackedMask(256, 5, 3))
    assert len({mask, PackedMask(384, 5, 3), PackedMask(256, 6, 3), PackedMask(256, 5, 4)}) == 4


@pytest.mark.parametrize(
    ("length", "longest", "expected"),
    [(1, 512, (128, 128)), (512, 512, (512, 512)), (1543, 512, (512, 2048)), (1030, 512, (384, 1152))],
)
def test_blocks_are_no_longer_than_they_need_to_be(length, longest, expected):
    assert blocks(length, longest) == expected


@BOTH
def test_padding_changes_neither_values_nor_gradients(attention, batch):
    weights, config = random_decoder(), with_attention(TIED, attention)
    expected = run(packed_forward, weights, config, batch)
    assert not batch.prompt_mask.all()
    assert not batch.action_mask.all()
    rng = np.random.default_rng(9)
    for garbage in (0, 10_000, -1, None):
        ids = rng.integers(0, 29, (2, *batch.action.shape)) if garbage is None else np.full((2, 1, 1, 1), garbage)
        spoiled = batch.replace(
            prompt=np.where(batch.prompt_mask, batch.prompt, ids[0, :, 0, :1]).astype(np.int32),
            action=np.where(batch.action_mask, batch.action, ids[1]).astype(np.int32),
        )
        found = run(packed_forward, weights, config, spoiled)
        assert worst_difference(at_real(found[0], batch), at_real(expected[0], batch)) == 0.0, garbage
        assert worst_difference(found[1], expected[1]) < 1e-6, garbage
        assert np.isfinite(found[0]).all(), garbage


@BOTH
def test_candidates_do_not_see_each_other(attention, batch):
    weights, config = random_decoder(), with_attention(TIED, attention)
    changed = batch.replace(action=np.concatenate([batch.action[:, :1], (batch.action[:, 1:] + 1) % 29], axis=1))
    before, after = (np.asarray(run(packed_forward, weights, config, b)[0]) for b in (batch, changed))
    assert worst_difference(before[:, 0], after[:, 0]) == 0.0
    assert worst_difference(before[:, 1:], after[:, 1:]) > 0.1


# ---------------------------------------------------------------- meshes

MESHED = DecoderConfig(
    vocab=32, model=16, layers=2, query_heads=4, kv_heads=2, head_dim=8, feed_forward=32, rope_theta=100.0
)


@pytest.mark.parametrize(("attention", "shape"), [("splash", (2, 2, 2)), ("cudnn", (1, 4, 2))])
def test_a_mesh_computes_the_same(attention, shape):
    mesh, config = make_mesh(*shape), with_attention(MESHED, attention)
    batch, weights = random_batch(seed=8, rows=4), random_decoder(MESHED)
    placed = place(weights, shardings(specs(MESHED), mesh)), place(batch, batch_sharding(mesh))
    meshed = functools.partial(packed_forward, mesh=mesh)
    assert_same(run(meshed, placed[0], config, placed[1]), run(two_part, weights, MESHED, batch), batch)


def test_each_device_does_its_rows_and_heads(monkeypatch):
    shapes = []
    whole = jax.nn.dot_product_attention

    def spy(q, k, v, **options):
        shapes.append((q.shape, k.shape))
        return whole(q, k, v, **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", spy)
    batch, weights = jax.tree.map(jnp.asarray, (random_batch(rows=8), random_decoder(MESHED)))
    inputs = batch.prompt, batch.prompt_mask, *branches(batch)
    meshed = jax.jit(functools.partial(packed_forward, mesh=make_mesh(2, 2, 2)), static_argnums=1)
    jax.eval_shape(meshed, weights, with_attention(MESHED, "cudnn"), *inputs)
    assert shapes == [((2, 32, 2, 8), (2, 32, 1, 8))], "30 tokens are filled up for cuDNN"


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"attention": "xla"}, {}, r"needs a fused kernel; got attention 'xla'\. Set attention to \"splash\" or"),
        ({"attention": "splash"}, {"platform": "gpu"}, "'splash' runs on tpu; got gpu"),
        ({"attention": "cudnn"}, {"platform": "tpu"}, "'cudnn' runs on gpu; got tpu"),
        ({"attention": "cudnn"}, {"platform": "gpu"}, "needs 16-bit activations; got float32"),
        ({"attention": "cudnn", "dtype": "bfloat16"}, {"platform": "gpu"}, "a head_dim that 8 divides; got 6"),
        ({"attention": "splash", "dtype": "float16"}, {"platform": "tpu"}, "cannot load float16"),
        ({"attention": "splash"}, {"block": 100}, "block must be a multiple of 128; got 100"),
        ({"attention": "splash"}, {"block": 0}, "block must be a multiple of 128; got 0"),
        ({"attention": "splash"}, {"mesh": (2, 1, 1)}, r"rows cannot be split over data \* fsdp = 2; got 3\."),
        ({"attention": "splash"}, {"mesh": (1, 1, 4)}, r"kv_heads cannot be split over tensor=4; got 2\."),
    ],
)
def test_what_cannot_run_is_refused_by_name(change, options, message, batch):
    options = {name: make_mesh(*value) if name == "mesh" else value for name, value in options.items()}
    config = dataclasses.replace(TIED, **change)
    with pytest.raises(InputError, match=message):
        packed_forward(random_decoder(), config, batch.prompt, batch.prompt_mask, *branches(batch), **options)


# ---------------------------------------------------------------- a real TPU compiler


@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_kernel_and_its_gradient_compile_for_tpus(head_dim, monkeypatch):
    """Ahead of time, on a mesh of four chips that need not be there."""
    pytest.importorskip("libtpu", reason="libtpu, which holds the TPU compiler, is not installed")
    settings = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    mesh = Mesh(np.reshape(topology.devices, (1, 2, 2)), MESH_AXES)
    config = DecoderConfig(
        vocab=512, model=256, layers=2, query_heads=4, kv_heads=2, head_dim=head_dim, feed_forward=512, remat="layer",
        dtype="bfloat16", attention="splash",
    )  # fmt: skip

    def shaped(leaf, sharding, dtype=None):
        return jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype, sharding=sharding)

    table, rows = specs(config), batch_sharding(mesh)
    weights = jax.tree.map(lambda spec, s: shaped(spec, s, "float32"), table, shardings(table, mesh), is_leaf=is_spec)
    batch = random_batch(rows=4, candidates=3, prompt=200, action=60)
    batch = jax.tree.map(lambda leaf: shaped(leaf, rows), batch)

    def loss(weights, batch):
        hidden = packed_forward(
            weights, config, batch.prompt, batch.prompt_mask, *branches(batch), mesh=mesh, block=128, platform="tpu"
        )
        return jnp.mean(hidden.astype(jnp.float32) ** 2)

    compiled = jax.jit(jax.grad(loss)).lower(weights, batch).compile()
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 4, "forward twice, dq, dk and dv"
