"""Checkpoints: every bit comes back, under any sharding; damage is named; a kill at any moment loses nothing.

Run as a script, this file is the job that the kill test kills: `test_checkpoint.py DIR`.
"""

import gc
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from jraggym.checkpoint import Checkpointer
from jraggym.errors import InputError


@struct.dataclass
class Layer:
    q: jax.Array
    bias: jax.Array
    name: str = struct.field(pytree_node=False, default="layer")


@struct.dataclass
class TrainState:
    params: dict[str, Layer]
    optimiser: Any
    key: jax.Array
    step: jax.Array
    extra: tuple


def make_state(seed: int = 0, width: int = 8) -> TrainState:
    keys = jax.random.split(jax.random.key(seed), 3)
    layer = Layer(jax.random.normal(keys[0], (width, 6)), jax.random.normal(keys[1], (6,), jnp.bfloat16))
    params = {"first/one": layer, "second.two['x']": Layer(layer.q * 2, -layer.bias, "other")}
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)).init(params)
    odd = jnp.asarray([jnp.nan, -0.0, jnp.inf], jnp.float16), jnp.zeros((0, 3)), None, jnp.asarray([True, False])
    integers = jnp.int8(-3), jnp.uint32(2**32 - 1)
    rbg = jax.random.key(seed, impl="rbg")
    return TrainState(params, optimiser, keys, jnp.int32(seed), (*odd, *integers, rbg, jax.random.PRNGKey(1)))


def bits(leaf) -> tuple[str, tuple[int, ...], bytes]:
    raw = jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
    return str(leaf.dtype), leaf.shape, np.asarray(raw).tobytes()


def assert_same(one, other):
    assert str(jax.tree.structure(one)) == str(jax.tree.structure(other))
    pairs = zip(jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other), strict=True)
    wrong = [jax.tree_util.keystr(path) for (path, leaf), back in pairs if bits(leaf) != bits(back)]
    assert not wrong, f"other bits in {wrong}"


def abstract(state):
    return jax.eval_shape(lambda tree: tree, state)


def files(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


def arrays_file(step: Path) -> Path:
    return max((path for path in step.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


@pytest.fixture
def abandoned_reads():
    """Orbax leaves its other reads unfinished when one fails; they are collected here, not in a later test."""
    yield
    gc.collect()


damages = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


# --- what comes back


def test_every_bit_comes_back(tmp_path):
    saved, state = Checkpointer(tmp_path / "new" / "folder"), make_state()
    data = {"step": 3, "order": [2, 1], "name": "ü", "share": 1 / 3, "none": None}
    assert saved.latest() is None
    saved.save(3, state, data)
    again = Checkpointer(tmp_path / "new" / "folder")
    assert again.latest() == 3
    back, position = again.restore(abstract(state))
    assert_same(state, back)
    assert position == data
    assert_same(state, again.restore(state)[0])  # arrays say their shapes too


def test_a_relative_folder_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Checkpointer("run").save(0, {"w": jnp.arange(3)}, {})
    assert_same(Checkpointer(tmp_path / "run").restore({"w": jnp.zeros(3, int)})[0], {"w": jnp.arange(3)})


def test_a_restored_state_trains_on_identically(tmp_path):
    """Two more steps after a restore are the same bits as two more steps without one."""
    optimiser = optax.adam(1e-2)

    @jax.jit
    def train(state):
        params, momenta, key = state
        key, now = jax.random.split(key)
        grads = jax.grad(lambda w: jnp.sum((w - jax.random.normal(now, w.shape)) ** 2))(params)
        updates, momenta = optimiser.update(grads, momenta)
        return optax.apply_updates(params, updates), momenta, key

    params = jnp.ones((4, 4))
    state = train((params, optimiser.init(params), jax.random.key(5)))
    Checkpointer(tmp_path).save(1, state, {})
    back, _ = Checkpointer(tmp_path).restore(abstract(state))
    assert_same(train(train(state)), train(train(back)))


def test_the_newest_are_kept_and_any_can_be_restored(tmp_path):
    saved = Checkpointer(tmp_path, keep=2)
    for step in (1, 5, 10, 20):
        saved.save(step, {"w": jnp.full(3, step)}, {"step": step})
    assert saved.steps() == [10, 20]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "20"]
    target = {"w": jnp.zeros(3, int)}
    assert [saved.restore(target, step)[1]["step"] for step in (10, 20, None)] == [10, 20, 20]


def test_resharding(tmp_path):
    """Saved from a 4 x 2 mesh, restored onto other meshes, onto one device and onto the default one."""
    devices = jax.devices()
    if len(devices) < 8:
        pytest.skip(f"needs 8 devices, there are {len(devices)}")
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    turned = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    small = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=devices[6:])
    plain = {
        "w": jax.random.normal(jax.random.key(0), (8, 16)),
        "b": jnp.arange(16, dtype=jnp.bfloat16),
        "keys": jax.random.split(jax.random.key(1), 8),
    }
    layout = {"w": P("data", "tensor"), "b": P("tensor"), "keys": P("data")}
    state = {name: jax.device_put(leaf, NamedSharding(mesh, layout[name])) for name, leaf in plain.items()}
    saved = Checkpointer(tmp_path)
    saved.save(0, state, {})
    targets: list[dict[str, Any]] = [
        {name: NamedSharding(turned, layout[name]) for name in plain},
        dict.fromkeys(plain, NamedSharding(small, P("data"))),
        dict.fromkeys(plain, SingleDeviceSharding(devices[5])),
        dict.fromkeys(plain),
    ]
    for shardings in targets:
        shapes = {n: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shardings[n]) for n, x in plain.items()}
        back, _ = saved.restore(shapes)
        assert_same(plain, back)
        for name, sharding in shardings.items():
            wanted = sharding or SingleDeviceSharding(devices[0])
            assert back[name].sharding.is_equivalent_to(wanted, back[name].ndim), f"{name} is laid out otherwise"


# --- what is refused


def test_other_trees_types_and_shapes_are_listed_with_both_sides(tmp_path):
    saved = Checkpointer(tmp_path)
    saved.save(0, {"a": jnp.zeros((2, 3)), "b": jnp.zeros(4), "gone": jnp.zeros(1), "key": jax.random.key(0)}, {})
    before = files(tmp_path)
    other = {
        "a": jnp.zeros((3, 3)),
        "b": jnp.zeros(4, jnp.bfloat16),
        "new": jnp.zeros(5),
        "key": jax.random.key(0, impl="rbg"),
    }
    with pytest.raises(InputError) as caught:
        saved.restore(other)
    for line in (
        f"{tmp_path}/0 is of another model",
        "['a']: expected float32[3,3], found float32[2,3]",
        "['b']: expected bfloat16[4], found float32[4]",
        "['new']: expected float32[5], found nothing",
        "['gone']: expected nothing, found float32[1]",
        "['key']: expected key<rbg>[], found key<fry>[]",
    ):
        assert line in str(caught.value)
    assert files(tmp_path) == before


def test_a_long_list_of_differences_is_cut(tmp_path):
    saved = Checkpointer(tmp_path)
    saved.save(0, {"a": jnp.zeros(1)}, {})
    with pytest.raises(InputError, match="; and 11 more"):
        saved.restore([jnp.zeros(1)] * 30)


def test_missing_checkpoints_are_named(tmp_path):
    saved = Checkpointer(tmp_path / "none")
    with pytest.raises(InputError, match=r"no checkpoint at all.*none.*steps \[\]"):
        saved.restore({"w": jnp.zeros(1)})
    assert not (tmp_path / "none").exists()
    saved.save(4, {"w": jnp.zeros(1)}, {})
    with pytest.raises(InputError, match=r"of step 5.*steps \[4\]"):
        saved.restore({"w": jnp.zeros(1)}, 5)


@pytest.mark.parametrize("step", [7, 3, -1])
def test_only_later_steps_are_saved(tmp_path, step):
    saved = Checkpointer(tmp_path)
    saved.save(7, {"w": jnp.zeros(1)}, {})
    before = files(tmp_path)
    with pytest.raises(InputError, match=rf"step {step} is not after the latest one.*got 7"):
        saved.save(step, {"w": jnp.ones(1)}, {})
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("state", "data", "message"),
    [
        ({"w": jnp.zeros(1), "lr": 0.1}, {}, r"no jax arrays; got \['lr'\]"),
        ({"w": np.zeros(1)}, {}, r"no jax arrays; got \['w'\]"),
        ({}, {}, "nothing to save"),
        ({"w": jnp.zeros(1)}, {"seen": {1, 2}}, "no JSON.*set"),
        ({"w": jnp.zeros(1)}, {"loss": float("nan")}, "no JSON"),
    ],
)
def test_what_cannot_be_saved_is_named(tmp_path, state, data, message):
    with pytest.raises(InputError, match=message):
        Checkpointer(tmp_path).save(0, state, data)
    assert not any(tmp_path.iterdir())


def test_bad_folders_are_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot write a checkpoint into"):
        Checkpointer(tmp_path / "file").save(0, {"w": jnp.zeros(1)}, {})
    with pytest.raises(InputError, match="keeps too few"):
        Checkpointer(tmp_path, keep=0)


@damages
def test_damage_is_named_with_the_way_out(tmp_path, abandoned_reads):
    """A cut array file: the message names the folder and the step to go on from, which indeed works."""
    saved, state = Checkpointer(tmp_path), make_state()
    for step in (1, 2):
        saved.save(step, state, {"step": step})
    cut(arrays_file(tmp_path / "2"))
    before = files(tmp_path)
    with pytest.raises(InputError, match=rf"{tmp_path}/2 is damaged.*Remove that folder and go on from step 1\."):
        saved.restore(abstract(state), 2)
    assert files(tmp_path) == before
    shutil.rmtree(tmp_path / "2")
    back, data = saved.restore(abstract(state))
    assert data == {"step": 1}
    assert_same(state, back)
    saved.save(2, state, {"step": 2})
    assert saved.latest() == 2


@damages
def test_the_newest_whole_one_is_used_and_nothing_is_lost(tmp_path, abandoned_reads, caplog):
    """Behind a whole checkpoint: one without its index, one that is cut off, and an empty folder."""
    saved, state = Checkpointer(tmp_path, keep=9), make_state()
    for step in range(1, 5):
        saved.save(step, state, {"step": step})
    shutil.rmtree(tmp_path / "2" / "index")
    cut(arrays_file(tmp_path / "3"))
    for path in (tmp_path / "4").iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    content = sorted(files(tmp_path).values())
    back, data = saved.restore(abstract(state))
    assert data == {"step": 1}
    assert_same(state, back)
    assert sorted(files(tmp_path).values()) == content
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2.damaged", "3.damaged", "4.damaged"]
    for step, record in zip((4, 3, 2), caplog.records, strict=True):
        assert record.levelname == "WARNING"
        assert f"{tmp_path}/{step} is damaged" in record.getMessage()
        assert f"set aside as {step}.damaged, and step 1 is used instead" in record.getMessage()
    saved.save(3, state, {"step": 3})
    cut(arrays_file(tmp_path / "3"))
    assert saved.restore(abstract(state))[1] == {"step": 1}
    assert (tmp_path / "3.damaged-2").is_dir()


@damages
def test_without_a_whole_one_nothing_changes(tmp_path, abandoned_reads):
    saved, state = Checkpointer(tmp_path), make_state()
    for step in (1, 2):
        saved.save(step, state, {"step": step})
        cut(arrays_file(tmp_path / str(step)))
    before = files(tmp_path)
    with pytest.raises(InputError, match=rf"no checkpoint in {tmp_path} is whole.*/2 is damaged.*/1 is damaged"):
        saved.restore(abstract(state))
    assert files(tmp_path) == before


def test_another_model_is_no_damage(tmp_path):
    saved = Checkpointer(tmp_path)
    for step in (1, 2):
        saved.save(step, {"w": jnp.zeros(step)}, {})
    with pytest.raises(InputError, match=r"/2 is of another model"):
        saved.restore({"w": jnp.zeros(1)})
    assert saved.steps() == [1, 2]


@damages
def test_no_damage_is_silent(tmp_path, abandoned_reads):
    """Whatever file is emptied, cut or has one bit flipped: the same state comes back, or the folder is named."""
    state, rng, messages = make_state(width=64), random.Random(0), []
    saved = Checkpointer(tmp_path)
    saved.save(0, state, {"step": 41})
    for path in sorted(path for path in tmp_path.rglob("*") if path.is_file()):
        good = path.read_bytes()
        spots = [rng.randrange(len(good)) for _ in range(3)]
        flipped = [good[:spot] + bytes([good[spot] ^ 1 << rng.randrange(8)]) + good[spot + 1 :] for spot in spots]
        for content in (b"", good[: len(good) // 2], *flipped):
            path.write_bytes(content)
            try:
                back, data = saved.restore(abstract(state))
            except InputError as error:
                messages.append(str(error))
            else:
                assert_same(state, back)
                assert data == {"step": 41}, f"damage to {path.name} changed the data position"
        path.write_bytes(good)
    assert len(messages) >= 10, f"only {len(messages)} kinds of damage were noticed"
    for message in messages:
        assert f"{tmp_path}/0 is damaged" in message
        assert "start again, for there is no older one" in message
        assert "\n" not in message
    assert_same(state, saved.restore(abstract(state))[0])


# --- the process around it


def saving_job(directory: str) -> None:
    """Saves from the latest step on, as fast as it can."""
    saved = Checkpointer(directory, keep=2)
    step = 0
    if saved.latest() is not None:
        _, data = saved.restore({"w": jnp.zeros((64, 64), jnp.int32)})
        step = data["step"] + 1
    print("ready", flush=True)
    while True:
        saved.save(step, {"w": jnp.full((64, 64), step, jnp.int32)}, {"step": step})
        step += 1


def test_a_kill_while_saving_leaves_a_whole_latest(tmp_path):
    """Real SIGKILLs at random moments of saving and pruning; each round goes on from what the last one left."""
    rng, saved = random.Random(0), Checkpointer(tmp_path)
    reached = [-1]
    for _ in range(5):
        command = [sys.executable, __file__, str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            assert process.stdout.readline() == b"ready\n", process.stderr.read().decode()
            while max(saved.steps(), default=-1) <= reached[-1] and process.poll() is None:
                time.sleep(0.01)  # each round finishes a save, on a busy machine too
            time.sleep(rng.uniform(0.05, 0.25))
            assert process.poll() is None, process.stderr.read().decode()
            process.send_signal(signal.SIGKILL)
        for step in saved.steps():
            state, data = saved.restore({"w": jnp.zeros((64, 64), jnp.int32)}, step)
            assert data == {"step": step}
            assert_same(state, {"w": jnp.full((64, 64), step, jnp.int32)})
        reached.append(max(saved.steps(), default=-1))
    assert reached == sorted(set(reached)), f"a step was lost: {reached}"
    saved.save(reached[-1] + 1, {"w": jnp.zeros((64, 64), jnp.int32)}, {})
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == [reached[-1], reached[-1] + 1], "leftovers stay"


def test_normal_use_is_quiet(tmp_path):
    code = """
import sys
import jax.numpy as jnp
from jraggym.checkpoint import Checkpointer
saved = Checkpointer(sys.argv[1])
for step in range(3):
    saved.save(step, {"w": jnp.ones(3)}, {"step": step})
saved.restore({"w": jnp.ones(3)})
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


if __name__ == "__main__":
    saving_job(sys.argv[1])
