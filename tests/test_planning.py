"""Plans: counts against hand-worked numbers, memory and exchanges, and real compilations where libtpu is installed."""

import dataclasses
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from jraggym.errors import InputError
from jraggym.models.critic import critic_specs
from jraggym.models.decoder import DecoderConfig, init, specs
from jraggym.planning.abstract import abstract_weights
from jraggym.planning.costs import Roofline, exchange_seconds, links, roofline
from jraggym.planning.flops import count_flops
from jraggym.planning.hlo import Collective, group_of, parse, size_of
from jraggym.planning.memory import bytes_on_device, kept_for_backward, parts_of_memory, refusal
from jraggym.planning.plan import Plan, best, choices, fitted, plan, search
from jraggym.planning.programs import left_out, programs
from jraggym.planning.topologies import CHIPS, GIB, Topology, parse_topology
from jraggym.recipes.experiment import Devices, Placed, critic_on
from jraggym.recipes.offline import Dpo, Sft, reference_rows
from jraggym.recipes.settings import Settings
from jraggym.sharding import MESH_AXES, make_mesh, place, shardings
from jraggym.steps import Network
from jraggym.training import Optimization, abstract_state, init_state

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install 'jraggym[plan]'"
)
TINY = DecoderConfig(vocab=256, model=32, layers=2, query_heads=2, kv_heads=2, head_dim=16, feed_forward=64)


# ---------------------------------------------------------------- topologies


@pytest.mark.parametrize(
    ("text", "kind", "shape", "slices", "size"),
    [
        ("v5e:8x8", "v5e", (8, 8), 1, 64),
        ("2xv5p:4x4x4", "v5p", (4, 4, 4), 2, 128),
        ("v6e:16x16", "v6e", (16, 16), 1, 256),
    ],
)
def test_topologies_are_read_and_written(text, kind, shape, slices, size):
    topology = parse_topology(text)
    assert (topology.kind, topology.shape, topology.slices, topology.size) == (kind, shape, slices, size)
    assert str(topology) == text


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("v5p", "no topology"),
        ("8x8", "no topology"),
        ("v9z:4x4", "unknown chip; got v9z. Use one of v5e, v5p, v6e."),
        ("v5p:8x8", "no shape of v5p; got 8x8. Its torus has 3 dimensions"),
        ("0xv5e:2x2", "no shape"),
    ],
)
def test_a_wrong_topology_is_named(text, says):
    with pytest.raises(InputError, match=r"no topology|unknown chip|no shape") as error:
        parse_topology(text)
    assert says in str(error.value)


def test_a_mesh_that_does_not_fit_its_topology_is_refused():
    for sizes in ((1, 4, 1), (1, 8, 1)):
        with pytest.raises(InputError, match="does not fit the topology"):
            Topology("v5e", (2, 2), slices=2).mesh(*sizes)


# ---------------------------------------------------------------- products


def test_flops_of_a_scan_are_those_of_its_unrolled_self():
    x, w = jnp.ones((8, 16)), jnp.ones((5, 16, 16))

    def scanned(x, w):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0]

    def unrolled(x, w):
        for i in range(5):
            x = x @ w[i]
        return x

    by_hand = 5 * 2 * 8 * 16 * 16
    assert count_flops(jax.make_jaxpr(scanned)(x, w)) == by_hand
    assert count_flops(jax.make_jaxpr(unrolled)(x, w)) == by_hand
    assert jax.jit(unrolled).lower(x, w).compile().cost_analysis()["flops"] == pytest.approx(by_hand, rel=0.01)


def test_flops_of_a_gradient_and_of_what_it_repeats():
    x, w = jnp.ones((4, 8)), jnp.ones((3, 8, 8))

    def loss(w, x, remat):
        def step(x, w):
            return jnp.tanh(x @ w), None

        return jnp.sum(jax.lax.scan(jax.checkpoint(step) if remat else step, x, w)[0])

    one = 2 * 4 * 8 * 8
    count = [count_flops(jax.make_jaxpr(jax.grad(loss), static_argnums=2)(w, x, remat)) for remat in (False, True)]
    assert count == [3 * 3 * one, 3 * 4 * one]  # forward and two products back; forward again


def test_flops_of_loops_branches_and_shards():
    x = jnp.ones((8, 8))
    one = 2 * 8**3

    def body(x):
        return jax.lax.while_loop(lambda x: x[0, 0] > 0, lambda x: x @ x, x) @ x

    nested = jax.make_jaxpr(lambda x: jax.lax.while_loop(lambda x: x[0, 0] > 0, body, x))(x)
    assert count_flops(nested) == 2 * one
    assert count_flops(nested, (3, 10)) == 3 * (10 + 1) * one

    branch = jax.make_jaxpr(lambda x: jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x))(x)
    assert count_flops(branch) == 2 * one

    mesh = make_mesh(8, 1, 1)
    mapped = jax.shard_map(
        lambda x: x @ x.T, mesh=mesh, in_specs=PartitionSpec("data"), out_specs=PartitionSpec("data")
    )
    assert count_flops(jax.make_jaxpr(mapped)(x)) == 8 * 2 * 1 * 8 * 1


def test_flops_of_a_decoder_step_are_those_of_the_formula():
    """6 x weights x tokens for the matrices, and 12 x N x Q x H x T x S for attention, S keys of each query."""
    experiment = _sft(rows=4, prompt=17, action=8)
    [step] = programs(experiment, make_mesh(1, 1, 1))
    config, b, p, a = TINY, 4, 16, 9  # the prompt's last token is the branch's first
    layer = 2 * config.model * 32 + 2 * config.model * 32 + 3 * config.model * config.feed_forward
    products = 6 * config.layers * layer * b * (p + a)
    attention = 12 * config.layers * 32 * b * (p * p + a * (p + a))
    vocabulary = 8 * config.model * config.vocab * b * (a - 1)  # forward, again, and two products back
    # What the last layer writes at the prompt is never read, but its products are in the program.
    assert count_flops(step.trace().jaxpr) == pytest.approx(products + attention + vocabulary, rel=0.02)


# ---------------------------------------------------------------- exchanges

TEXT = """HloModule jit_f, is_scheduled=true

%add.1 (x.1: f32[], y.1: f32[]) -> f32[] {
  %x.1 = f32[] parameter(0)
  %y.1 = f32[] parameter(1)
  ROOT %add.2 = f32[] add(%x.1, %y.1)
}

%all-reduce-scatter.1 (input: f32[8,4]) -> f32[2,4] {
  %input = f32[8,4]{1,0} parameter(0)
  %all-reduce.1 = f32[8,4]{1,0} all-reduce(%input), channel_id=3, replica_groups=[2,4]<=[8], to_apply=%add.1
  %zero = s32[] constant(0)
  ROOT %dynamic-slice.1 = f32[2,4]{1,0} dynamic-slice(%all-reduce.1, %zero, %zero), dynamic_slice_sizes={2,4}
}

%body.1 (arg.1: (s32[], f32[16,4], bf16[2,4])) -> (s32[], f32[16,4], bf16[2,4]) {
  %arg.1 = (s32[], f32[16,4]{1,0}, bf16[2,4]{1,0:T(8,128)(2,1)}) parameter(0)
  %i.1 = s32[] get-tuple-element(%arg.1), index=0
  %stack.1 = f32[16,4]{1,0} get-tuple-element(%arg.1), index=1
  %w.1 = bf16[2,4]{1,0:T(8,128)(2,1)} get-tuple-element(%arg.1), index=2
  %whole.1 = bf16[8,4]{1,0} all-gather(%w.1), channel_id=1, replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}
  %part.1 = f32[1,4]{1,0} fusion(%stack.1, %i.1), kind=kLoop, calls=%sliced.1
  ROOT %tuple.1 = (s32[], f32[16,4]{1,0}, bf16[2,4]{1,0:T(8,128)(2,1)}) tuple(%i.1, %stack.1, %w.1)
}

%sliced.1 (stack.2: f32[16,4], i.2: s32[]) -> f32[1,4] {
  %stack.2 = f32[16,4]{1,0} parameter(0)
  %i.2 = s32[] parameter(1)
  %zero.2 = s32[] constant(0)
  ROOT %dynamic-slice.2 = f32[1,4]{1,0} dynamic-slice(%stack.2, %i.2, %zero.2), dynamic_slice_sizes={1,4}
}

%condition.1 (arg.2: (s32[], f32[16,4], bf16[2,4])) -> pred[] {
  %arg.2 = (s32[], f32[16,4]{1,0}, bf16[2,4]{1,0}) parameter(0)
  %i.3 = s32[] get-tuple-element(%arg.2), index=0
  %end.1 = s32[] constant(16)
  ROOT %less.1 = pred[] compare(%i.3, %end.1), direction=LT
}

ENTRY %main.1 (p.1: (s32[], f32[16,4], bf16[2,4]), g.1: f32[8,4], fast.1: f32[64]) -> f32[2,4] {
  %p.1 = (s32[], f32[16,4]{1,0}, bf16[2,4]{1,0}) parameter(0)
  %g.1 = f32[8,4]{1,0} parameter(1)
  %fast.1 = f32[64]{0:T(128)S(1)} parameter(2)
  %loop.1 = (s32[], f32[16,4]{1,0}, bf16[2,4]{1,0}) while(%p.1), condition=%condition.1, body=%body.1
  %near.1 = f32[64]{0:T(128)S(1)} negate(%fast.1)
  ROOT %fusion.1 = f32[2,4]{1,0} fusion(%g.1), kind=kCustom, calls=%all-reduce-scatter.1
}
"""


def test_exchanges_and_traffic_of_a_program_are_counted_by_hand():
    module = parse(TEXT, 8)
    found = {c.kind: c for c in module.collectives}
    assert found["all-gather"] == Collective("all-gather", 8 * 4 * 2, (0, 1, 2, 3), times=16)
    assert found["reduce-scatter"] == Collective("reduce-scatter", 8 * 4 * 4, (0, 1, 2, 3), times=1)
    gathered, sliced, counter = 2 * 4 * 2 + 8 * 4 * 2, 2 * 4 * 4, 4
    scattered = 8 * 4 * 4 + 2 * 4 * 4
    assert module.traffic == 16 * (gathered + sliced + counter) + scattered  # nothing of fast memory


def test_loops_with_unsigned_counters_are_counted():
    unsigned = parse(TEXT.replace("s32[]", "u32[]"), 8)
    assert {c.kind: c.times for c in unsigned.collectives} == {"all-gather": 16, "reduce-scatter": 1}


@pytest.mark.parametrize(
    ("text", "group"),
    [
        ("replica_groups={{0,2},{1,3}}, x", (0, 2)),
        ("replica_groups=[2,4]<=[8], x", (0, 1, 2, 3)),
        ("replica_groups=[4,2]<=[2,4]T(1,0), x", (0, 4)),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}, x", (0, 1, 4, 5)),
        ("source_target_pairs={{0,1},{1,2}}", (0, 1)),
        ("replica_groups={}, x", tuple(range(8))),
    ],
)
def test_groups_of_devices_are_read(text, group):
    assert group_of(text, 8) == group


def test_sizes_of_types():
    assert size_of("(bf16[2,3]{1,0:T(8,128)(2,1)}, s32[], pred[8]{0:T(256)S(1)})") == 12 + 4 + 8
    assert size_of("(bf16[2,3]{1,0}, pred[8]{0:T(256)S(1)})", main=True) == 12
    assert size_of("u4[4], token[]") == 2


@pytest.mark.parametrize("axis", ["data", "fsdp", "tensor"])
def test_exchanges_under_weak_scaling_grow_as_theory_says(axis):
    from benchmarks.weak_scaling import table, weight_bytes

    two, four = table(axis, (2, 4))
    total = [sum(row["bytes"].values()) for row in (two, four)]
    if axis == "data":  # every gradient once for the prompts' pass and once for the branches', on any number of devices
        assert two["count"] == four["count"]
        assert weight_bytes() <= four["bytes"]["all-reduce"] < 2.5 * weight_bytes()
        assert total[0] == pytest.approx(total[1], rel=0.01)
    elif axis == "fsdp":  # weights are gathered and gradients added up; activations, 10 MB here, stay where they are
        assert two["count"] == four["count"]
        assert total[0] == pytest.approx(total[1], rel=0.01)
        assert 3 * weight_bytes() < four["bytes"]["all-gather"] < 4 * weight_bytes()
        assert four["bytes"]["all-reduce"] < 2.5 * weight_bytes()
    else:  # rows are not split: bytes grow with them
        assert total[1] > 1.5 * total[0]


# ---------------------------------------------------------------- memory and time


def test_abstract_states_are_those_that_training_makes():
    mesh, table = make_mesh(1, 4, 2), specs(TINY)
    weights = place(init(table, jax.random.key(0)), shardings(table, mesh))
    for rate in (0.0, 1e-2):  # AdamW, and Muon with AdamW
        optimizer = Optimization(10, matrix_rate=rate).build()
        real = init_state(weights, optimizer)
        planned = abstract_state(abstract_weights(table, mesh), optimizer)
        assert jax.tree.structure(real) == jax.tree.structure(planned)
        for a, b in zip(jax.tree.leaves(real), jax.tree.leaves(planned), strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            assert a.sharding.is_equivalent_to(b.sharding, a.ndim)


def test_bytes_on_a_device_are_those_of_its_part():
    weights = abstract_weights(specs(TINY), make_mesh(1, 4, 2))
    assert bytes_on_device(weights.embed) == 256 * 32 * 4 // 8
    assert bytes_on_device(weights.layers.attention_norm) == 2 * 32 * 4


def test_what_layers_keep_for_the_backward_pass():
    def loss(w, x):
        def step(x, w):
            return jnp.sin(x @ w), None

        return jnp.sum(jax.lax.scan(jax.checkpoint(step), x, w)[0])

    kept = kept_for_backward(jax.make_jaxpr(jax.grad(loss))(jnp.ones((6, 8, 8)), jnp.ones((4, 8))))
    assert kept == 6 * 4 * 8 * 4  # each layer's input


def test_parts_of_memory_add_up_to_the_peak():
    held = {"weights": jax.ShapeDtypeStruct((1000,), jnp.float32)}
    stats = dataclasses.make_dataclass("S", [])()
    sizes = {"temp": 900, "argument": 4200, "generated_code": 10, "output": 4100, "alias": 4000}
    for name, size in sizes.items():
        setattr(stats, f"{name}_size_in_bytes", size)
    parts = parts_of_memory(held, stats, activations=500, cache=1000)
    assert parts == {"weights": 4000, "activations": 500, "KV cache": 400, "temporaries": 200 + 10 + 100}


def test_the_compilers_refusal_is_read():
    text = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 33.34G of 15.75G hbm. Exceeded by 17.59G."
    assert refusal(text, GIB) == (33.34 * GIB, 15.75 * GIB)
    text = "RESOURCE_EXHAUSTED: the total memory required for HLO temporaries (68.01G) exceeds available HBM (15.75G)."
    assert refusal(text, 2 * GIB) == (70.01 * GIB, 15.75 * GIB)
    assert refusal("something else", GIB) is None


def test_seconds_of_exchanges():
    chip, pod = CHIPS["v5p"], parse_topology("v5p:4x4x4")

    def seconds(topology, kind, group):
        return exchange_seconds(topology, Collective(kind, 8_000, tuple(group), 1))

    assert seconds(pod, "all-gather", range(4)) == pytest.approx(8_000 * 3 / 4 / (2 * chip.link_rate))
    assert seconds(pod, "all-gather", range(8)) == pytest.approx(8_000 * 7 / 8 / chip.link_rate)
    assert seconds(pod, "all-reduce", range(64)) == pytest.approx(2 * 8_000 * 63 / 64 / (6 * chip.link_rate))
    assert seconds(pod, "collective-permute", (0, 1)) == pytest.approx(8_000 / chip.link_rate)

    chip, two = CHIPS["v5e"], parse_topology("2xv5e:2x2")
    assert seconds(two, "all-reduce", (0, 4)) == pytest.approx(8_000 / chip.slice_rate)
    assert seconds(two, "collective-permute", (0, 4)) == pytest.approx(8_000 / chip.slice_rate)
    within, between = 8_000 * 3 / 4 / (2 * chip.link_rate), 8_000 / 4 / 2 / chip.slice_rate
    assert seconds(two, "reduce-scatter", range(8)) == pytest.approx(within + between)
    assert seconds(two, "all-reduce", range(8)) == pytest.approx(2 * (within + between))


@pytest.mark.parametrize(
    ("topology", "expected"),
    [
        ("v5p:4x4x4", {2: 1, 4: 2, 8: 1, 16: 4, 64: 6}),
        ("v5p:2x2x4", {2: 1, 4: 2, 8: 2, 16: 3}),  # no whole cube: no rings
        ("v5e:8x8", {2: 1, 4: 1, 8: 1, 64: 2}),
        ("v6e:16x16", {4: 1, 16: 2, 32: 1, 256: 4}),
        ("v5e:8x16", {8: 1, 16: 2, 128: 3}),
    ],
)
def test_links_of_groups(topology, expected):
    assert {n: links(parse_topology(topology), n) for n in expected} == expected


def test_a_roofline_by_hand():
    found = roofline(parse_topology("v5e:2x2"), 4 * 197e12, 2 * 197e12, 819e9 / 2, [])
    assert (found.products, found.memory, found.exchange, found.bound) == (1.0, 0.5, 0.0, "products")
    assert (found.best, found.in_turn, found.mfu) == (1.0, 1.5, (0.5 / 1.5, 0.5))


# ---------------------------------------------------------------- plans


def _sft(rows=4, prompt=16, action=8, config=TINY, **more):
    settings = Settings(model=config, states=rows, max_prompt=prompt, max_action=action, contrasts=1)
    optimization = Optimization(10, matrix_rate=0.0)
    return Sft(out=Path("x"), data=Path("y"), settings=settings, optimization=optimization, **more)


def _plan(experiment="x", temporaries=1.0, seconds=1.0, **more):
    where = {"topology": parse_topology("v5e:2x2"), "devices": Devices(1, 4, 1), "remat": "dots", "parts": 1}
    where["rows"] = 8
    memory = {"weights": 1.0 * GIB, "temporaries": temporaries * GIB}
    times = Roofline(seconds, 0.0, 0.0, seconds)
    return Plan(experiment, "step", **{**where, **more}, tokens=1, memory=memory, seconds=1.0, times=times)


def test_remedies_name_what_is_too_large():
    assert _plan(temporaries=20).remedies()[:2] == ["--settings.model.remat layer", "--parts 2"]
    split = _plan(temporaries=20, parts=2)  # four micro-batches of 8 rows over 4 shards there are not
    assert split.remedies()[:2] == ["--settings.model.remat layer", "--devices.tensor 2 --devices.fsdp 2"]
    cached = dataclasses.replace(_plan(rows=0), memory={"weights": 12.0 * GIB, "KV cache": 8.0 * GIB})
    assert [remedy.split()[0] for remedy in cached.remedies()[:2]] == ["--devices.tensor", "fewer"]
    assert not any("--parts" in remedy or "lora" in remedy for remedy in cached.remedies())
    held = dataclasses.replace(_plan(), memory={"weights": 20.0 * GIB, "temporaries": 1.0})
    assert not held.fits
    assert "--lora.rank 16" in held.remedies()[0]
    assert _plan().fits
    assert not dataclasses.replace(_plan(), message="needs 20 GiB of 15.8").fits


def test_the_best_choice_fits_and_is_the_fastest():
    slow, fast, large = _plan("slow", seconds=2.0), _plan("fast"), _plan("large", 20, 0.5)
    assert best([[slow], [fast], [large]]) == [fast]
    assert best([[large]]) is None
    often, seldom = _plan("often", seconds=2.0, runs=9), _plan("seldom", seconds=3.0, runs=1)
    assert best([[often, fast], [seldom, slow]]) == [seldom, slow]


def test_an_experiment_is_fitted_to_a_topology():
    experiment = _sft(devices=Devices(tensor=2))
    assert fitted(experiment, parse_topology("v5e:2x2")).devices == Devices(1, 2, 2)
    assert fitted(experiment, parse_topology("2xv5e:2x2")).devices == Devices(2, 2, 2)
    with pytest.raises(InputError, match="cannot be split"):
        fitted(dataclasses.replace(experiment, devices=Devices(tensor=3)), parse_topology("v5e:2x2"))


def test_the_mesh_of_the_rollouts_is_fitted_to_all_chips_too():
    experiment = _small_online("grpo-llama-8b", devices=Devices(fsdp=64), rollout_devices=Devices(1, 8, 2))
    assert fitted(experiment, parse_topology("v5e:2x2")).rollout_devices == Devices(1, 2, 2)
    wrong = dataclasses.replace(experiment, rollout_devices=Devices(tensor=3))
    with pytest.raises(InputError, match=r"--rollout-devices\.tensor"):
        fitted(wrong, parse_topology("v5e:2x2"))


def test_choices_keep_the_heads_whole():
    found = choices(_sft(), parse_topology("v5e:2x2"))
    assert {option.devices for option in found} == {Devices(1, 4, 1), Devices(1, 2, 2)}
    assert {option.settings.model.remat for option in found} == {"none", "dots", "layer"}


def test_rows_that_cannot_be_split_are_refused():
    with pytest.raises(InputError, match="cannot be split"):
        programs(_sft(rows=6), make_mesh(1, 4, 1))
    with pytest.raises(InputError, match=r"micro-batch.*--settings\.tokens"):
        programs(_sft(rows=8, parts=4), make_mesh(1, 4, 1))


@pytest.mark.parametrize(
    "name", ["dpo-llama-8b", "critic-llama-8b", "grpo-llama-8b", "ppo-llama-70b", "sft-llama-70b-lora"]
)
def test_every_program_of_the_large_experiments_can_be_traced(name):
    """On CPU devices, in two layers: the shapes, objectives and callbacks of all programs belong together."""
    from train.plan import EXPERIMENTS

    experiment = EXPERIMENTS[name][1]
    model = dataclasses.replace(TINY, attention="splash", dtype="bfloat16", remat="layer", tied=False, kv_heads=1)
    sizes = {"states": 8, "max_prompt": 16, "max_action": 8, "episodes": 8, "tokens": 8 * 24, "edges": ((16, 8),)}
    settings = dataclasses.replace(experiment.settings, model=model, **sizes)
    if hasattr(experiment, "schedule"):
        schedule = dataclasses.replace(experiment.schedule, rows=8, prompt=16, action=8)
        experiment = dataclasses.replace(experiment, schedule=schedule, slots=8, rollout_devices=Devices(2, 4))
    made = programs(dataclasses.replace(experiment, settings=settings), make_mesh(1, 8, 1))
    names = {"grpo": ["rollout, one turn", "experience", "policy step"]}
    names["ppo"] = [*names["grpo"], "value step"]
    names["dpo"] = ["reference", "step"]
    assert [program.name for program in made] == names.get(name.split("-")[0], ["step"])
    assert all(count_flops(program.trace().jaxpr, program.trips) > 0 for program in made)


def _small_online(name, **fields):
    """An on-policy experiment in two layers."""
    from train.plan import EXPERIMENTS

    sizes = {"states": 8, "max_prompt": 16, "max_action": 8, "episodes": 8, "max_turns": 3}
    experiment = EXPERIMENTS[name][1]
    settings = dataclasses.replace(experiment.settings, model=TINY, **sizes)
    schedule = dataclasses.replace(experiment.schedule, rows=8, prompt=16, action=8, candidates=4, updates=2, epochs=3)
    fields = {"schedule": schedule, "slots": 8, "questions": 20, "rollout_devices": Devices(), **fields}
    return dataclasses.replace(experiment, settings=settings, **fields)


def test_rollouts_on_a_mesh_of_their_own_are_planned_there():
    mesh, there = make_mesh(1, 8, 1), Devices(1, 4, 2)
    plain, moved = (
        programs(_small_online("grpo-llama-8b", **fields), mesh)[0] for fields in ({}, {"rollout_devices": there})
    )
    assert plain.devices is None
    assert moved.devices == there
    assert "rollout actor" not in plain.held
    assert all(
        dict(leaf.sharding.mesh.shape) == {"data": 1, "fsdp": 4, "tensor": 2}
        for leaf in jax.tree.leaves(moved.held["rollout actor"])
    )
    assert moved.cache == plain.cache  # half as many heads of twice as many rows
    assert "moving the weights" in left_out(_small_online("grpo-llama-8b", rollout_devices=there))


def test_a_critic_whose_scores_are_rewards_is_planned():
    mesh = make_mesh(8, 1, 1)
    plain, scored = (
        {program.name: program for program in programs(_small_online("ppo-llama-8b", **fields), mesh)}
        for fields in ({}, {"rewards": "critic", "critic": Path("x")})
    )
    for name, program in scored.items():  # it stays in memory all the time
        assert bytes_on_device(program.held) - bytes_on_device(plain[name].held) > bytes_on_device(plain[name].held) / 9
    flops = [count_flops(p["rollout, one turn"].trace().jaxpr, (1, 8)) for p in (plain, scored)]
    assert flops[1] > 1.2 * flops[0]  # its passes over prompts and actions
    with pytest.raises(InputError, match="a critic goes with rewards=critic"):
        programs(_small_online("ppo-llama-8b", rewards="critic"), mesh)


@pytest.mark.parametrize(("rewards", "episodes"), [("process", 20), ("outcome", 20 * 4)])
def test_how_often_programs_run_in_an_iteration(rewards, episodes):
    made = programs(_small_online("grpo-llama-8b", rewards=rewards), make_mesh(8, 1, 1))
    turns = 3 * -(-episodes // 8)
    assert {p.name: p.runs for p in made} == {"rollout, one turn": turns, "experience": 1, "policy step": 6}


def test_what_a_plan_leaves_out_is_said():
    from train.plan import EXPERIMENTS

    found = {name: left_out(EXPERIMENTS[f"{name}-llama-8b"][1]) for name in ("sft", "critic", "ppo", "collect")}
    assert found["sft"] == "greedy rollouts of the evaluation"
    assert found["ppo"] == "greedy rollouts of the evaluation, moving the weights to the mesh of the rollouts"
    assert "held-out labels" in found["critic"]
    assert found["collect"] == "nothing"


def test_an_unknown_program_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(Topology, "mesh", lambda *_: make_mesh(1, 4, 1))
    with pytest.raises(InputError, match=r"no such program; got rollout\. Use the beginning of step"):
        list(plan(_sft(), parse_topology("v5e:2x2"), only="rollout"))
    with pytest.raises(InputError, match="no such program"):  # of every choice
        list(search(_sft(), parse_topology("v5e:2x2"), only="rollout"))


def test_a_search_goes_on_where_the_compiler_fails(monkeypatch):
    def compiled(option, *_, **__):
        if option.devices.tensor == 1:
            raise jax.errors.JaxRuntimeError("INTERNAL: Mosaic failed\nmore")
        if option.settings.model.remat != "layer":
            raise InputError("rows cannot be split", got=6, remedy="Choose a multiple.")
        yield _plan("fine")

    monkeypatch.setattr("jraggym.planning.plan.plan", compiled)
    tried = list(search(_sft(), parse_topology("v5e:2x2")))
    assert {p.message for [p] in tried if not p.fits} == {"the compiler failed: INTERNAL: Mosaic failed"}
    assert best(tried) == [_plan("fine")]


def test_the_reference_is_planned_with_as_many_rows_as_training_gives_it():
    for parts in (1, 4):  # micro-batches of so few rows could not be split
        model = dataclasses.replace(TINY, attention="splash", dtype="bfloat16", remat="layer")
        settings = Settings(model=model, states=64, max_prompt=16, max_action=8, contrasts=2)
        experiment = Dpo(out=Path("x"), settings=settings, parts=parts)
        [reference, step] = programs(experiment, make_mesh(8, 1, 1))
        assert (reference.name, reference.tokens) == ("reference", 16 * (16 + 2 * 8))
        assert 0 < count_flops(reference.trace().jaxpr) < count_flops(step.trace().jaxpr) / 4
    [only] = programs(dataclasses.replace(experiment, keep_reference=False), make_mesh(8, 1, 1))
    assert only.name == "step"
    assert reference_rows(AbstractMesh((2, 32, 2), MESH_AXES)) == 64
    assert reference_rows(None) == 16


@pytest.mark.parametrize("mesh", [None, (1, 4, 2)])
def test_a_fresh_critic_on_a_trunk_has_the_bits_of_one_drawn_whole(mesh):
    table, key = critic_specs(TINY, likelihood=True), jax.random.key(3)
    net = Network(TINY, mesh=make_mesh(*mesh) if mesh else None)
    trunk = init(specs(TINY), jax.random.key(4))
    trunk = place(trunk, shardings(specs(TINY), net.mesh)) if mesh else trunk
    found, whole = critic_on(Placed(net, trunk, trunk, net.mesh), table, key), init(table, key)
    np.testing.assert_array_equal(found.head, whole.head)
    np.testing.assert_array_equal(found.likelihood, whole.likelihood)
    assert found.trunk is trunk
    assert len(found.head.devices()) == (8 if mesh else 1)


@pytest.fixture(scope="module")
def small():
    """A step with shapes that the TPU's compiler takes in seconds."""
    config = dataclasses.replace(TINY, dtype="bfloat16", remat="layer", tied=False)
    return _sft(rows=4, config=config, devices=Devices(fsdp=4))


@needs_libtpu
def test_a_small_step_compiles_for_a_slice_and_fits(small):
    [found] = plan(small, parse_topology("v5e:2x2"), name="small")
    assert found.fits
    assert 0 < found.peak < GIB
    assert found.flops > found.useful > 0
    assert found.by_kind()["all-gather"][0] > 0
    assert found.times is not None
    assert found.times.best > 0


@needs_libtpu
def test_a_step_that_is_too_large_is_refused_with_what_to_change(small):
    config = dataclasses.replace(small.settings.model, vocab=2**21, model=4_096)
    large = dataclasses.replace(small, settings=dataclasses.replace(small.settings, model=config))
    [found] = plan(large, parse_topology("v5e:2x2"), name="large")
    assert not found.fits
    assert "of 15." in found.message
    assert found.remedies()


@pytest.mark.parametrize(("temporaries", "code"), [(1, None), (20, 1)])
def test_the_entry_says_by_its_exit_code_whether_it_fits(monkeypatch, capsys, temporaries, code):
    from train import plan as entry

    monkeypatch.setattr(entry, "plan", lambda *_, **__: iter([_plan("x", temporaries)]))
    words = "train.plan dpo-llama-8b --topology v5e:2x2 --settings.model.remat dots --devices.fsdp 4"
    monkeypatch.setattr("sys.argv", words.split())
    if code is None:
        entry.main()
        assert "fits; HBM of a chip 15.75 GiB, free 13.75 GiB" in capsys.readouterr().out
    else:
        with pytest.raises(SystemExit) as ended:
            entry.main()
        assert ended.value.code == code
        assert "change: --settings.model.remat layer" in capsys.readouterr().out


def test_a_table_ends_with_what_it_assumes_and_leaves_out(monkeypatch, capsys):
    from train import plan as entry

    one = dataclasses.replace(_plan(), memory=dict.fromkeys(("weights", "activations", "KV cache", "temporaries"), GIB))
    monkeypatch.setattr(entry, "plan", lambda *_, **__: iter([one, one]))
    words = "train.plan dpo-llama-8b --topology v5e:2x2 v5e:2x4 --markdown"
    monkeypatch.setattr("sys.argv", words.split())
    entry.main()
    *table, empty, assumed, _, left = capsys.readouterr().out.splitlines()
    assert len(table) == 2 + 4
    assert (empty, assumed, left) == ("", entry.ASSUMPTIONS, "Not planned: greedy rollouts of the evaluation.")


def test_the_entry_refuses_a_wrong_topology(monkeypatch, capsys):
    from train.plan import main

    monkeypatch.setattr("sys.argv", "train.plan sft-llama-8b --topology v5e:nowhere".split())
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "error: no topology; got 'v5e:nowhere'" in capsys.readouterr().err


@needs_libtpu
def test_a_search_names_the_best_that_fits(small, monkeypatch):
    monkeypatch.setattr("jraggym.planning.plan.choices", lambda *_: [small, dataclasses.replace(small, parts=2)])
    reports = []
    tried = list(search(small, parse_topology("v5e:2x2"), report=lambda *told: reports.append(told)))
    assert len(tried) == len(reports) == 1  # the first fits, and more micro-batches would only repeat work
    assert best(tried) == tried[0]


def test_ctrl_c_ends_a_search_with_what_is_known(monkeypatch, capsys):
    from train import plan as entry

    def interrupted(*_, **__):
        yield [_plan("known")]
        raise KeyboardInterrupt

    monkeypatch.setattr(entry, "search", interrupted)
    job = entry.Job(_sft(), ("v5e:2x2",), search=True)
    assert entry.run(job, "known", parse_topology("v5e:2x2"))
    assert "known, step, on v5e:2x2" in capsys.readouterr().out


def test_the_rows_of_the_table_have_its_columns():
    from train.plan import HEAD, row

    refused = dataclasses.replace(_plan(), message="needs 20 GiB of 15.8", times=None)
    memory = dict.fromkeys(("weights", "activations", "KV cache", "temporaries"), GIB)
    for one in (_plan(), refused):
        assert row(dataclasses.replace(one, memory=memory)).count("|") == HEAD.count("|")


def test_numbers_of_chips_are_positive():
    for chip in CHIPS.values():
        assert min(chip.flops, chip.hbm, chip.hbm_rate, chip.link_rate, chip.slice_rate) > 0
        assert chip.source.startswith("https://")
    assert np.isclose(CHIPS["v5p"].flops / CHIPS["v5e"].flops, 459 / 197)
