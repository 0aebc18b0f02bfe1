"""What steps cost: seconds by kind, tokens and FLOPs a second, memory, and a trace on demand."""

import dataclasses
import threading
import time
from contextlib import suppress

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from array_samples import TIED, random_batch, random_decoder

from jraggym import meter as module
from jraggym.clock import spent, take
from jraggym.meter import Meter, tokens_of
from jraggym.steps import Network, sft
from jraggym.training import Optimization, Run, fit

OPTIMIZATION = Optimization(steps=4, matrix_rate=0.0, warmup=1)


class Batches:
    def __getitem__(self, step):
        time.sleep(0.05)
        return random_batch()


def measured(run, folder=None):
    told = {}
    meter = Meter(lambda step, measures: told.update({step: dict(measures)}), folder)
    fit(run, random_decoder(), meter=meter)
    return told


def test_the_clock_adds_up_what_threads_spend_and_begins_anew():
    take()

    def work():
        with spent("a"):
            time.sleep(0.02)

    threads = [threading.Thread(target=work) for _ in range(3)]
    [thread.start() for thread in threads]
    with spent("b"), spent("a"):
        time.sleep(0.02)
    [thread.join() for thread in threads]
    found = take()
    assert found.keys() == {"a", "b"}
    assert found["a"] >= 0.08
    assert 0.02 <= found["b"] < found["a"]
    assert take() == {}


def test_a_failing_block_counts_too():
    take()
    with pytest.raises(ZeroDivisionError), spent("a"):
        _ = 1 / 0
    assert take().keys() == {"a"}


def test_every_step_of_a_run_is_told_once_with_where_its_time_went():
    told = measured(Run(sft(Network(TIED)), OPTIMIZATION, Batches()))
    assert list(told) == [1, 2, 3, 4]
    batch = random_batch()
    tokens = int(batch.prompt_mask.sum() + batch.action_mask.sum())
    for measures in told.values():
        assert measures["seconds_data"] >= 0.05
        assert measures["seconds_compute"] > 0
        assert measures["seconds"] >= measures["seconds_data"] + measures["seconds_compute"]
        assert measures["tokens_per_second"] == pytest.approx(tokens / measures["seconds"])
        assert measures["host_gib"] > 0.05
        assert "mfu" not in measures, "the peak of a CPU is not known"


def test_utilisation_is_the_models_own_flops_over_the_peak(monkeypatch):
    monkeypatch.setitem(module.PEAKS, jax.devices()[0].device_kind, 1e9)
    nets = [Network(TIED), Network(dataclasses.replace(TIED, remat="layer"), parts=3)]
    found = []
    for net in nets:
        told = measured(Run(sft(net), OPTIMIZATION, Batches(), plain=sft(net.plain)))[3]
        found.append(told["mfu"] * told["seconds"] * 1e9 * jax.device_count())
    assert found[0] == pytest.approx(found[1], rel=1e-9), (
        "what is computed again to save memory is not the model's work"
    )
    batch, weights = random_batch(), random_decoder()
    tokens = batch.prompt_mask.size + batch.action_mask.size
    matrices = sum(x.size for x in jax.tree.leaves(weights.layers) if x.ndim == 3)
    assert found[0] > 6 * matrices * tokens, "three products for each weight and token, and attention and vocabulary"


def test_tokens_of_experience_and_of_what_has_none():
    batch = random_batch()
    assert float(tokens_of(batch)) == batch.prompt_mask.sum() + batch.action_mask.sum()
    assert tokens_of({"w": np.ones(3)}) == 0.0


def test_a_file_asks_for_a_trace_of_some_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LOOK", 0.0)
    (tmp_path / "trace").touch()
    told = []
    with Meter(lambda step, measures: told.append(step), tmp_path) as meter:
        for step in range(1, 8):
            jnp.ones(3).block_until_ready()
            meter.step(step, 1.0)
            assert (tmp_path / "trace").exists() == (step <= module.TRACED), step
    assert told == [*range(1, 8)]
    assert len(list(tmp_path.glob("profile/plugins/profile/*/*.xplane.pb"))) == 1


def test_a_run_that_ends_ends_its_trace(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LOOK", 0.0)
    (tmp_path / "trace").touch()
    with suppress(KeyboardInterrupt), Meter(None, tmp_path) as meter:
        meter.step(1, 1.0)
        raise KeyboardInterrupt
    assert not (tmp_path / "trace").exists()
    assert list(tmp_path.glob("profile/plugins/profile/*/*.xplane.pb"))
