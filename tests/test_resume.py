"""A training run that is killed (SIGKILL) again and again ends with the bits of an uninterrupted one."""

import os
import signal
import subprocess
import sys
import time

import numpy as np

SCRIPT = """
import sys, time
from pathlib import Path
import jax, numpy as np
from jraggym.checkpoint import Checkpointer
from jraggym.models.decoder import DecoderConfig, init, specs
from jraggym.objectives.forward import token_logprobs
from jraggym.objectives.sft import sft_loss
from jraggym.text.batching import Batches, Bucket, Row
from jraggym.training import Optimization, Run, fit

out, pause = Path(sys.argv[1]), float(sys.argv[2])
config = DecoderConfig(vocab=32, model=8, layers=1, query_heads=1, kv_heads=1, head_dim=8, feed_forward=8)
rng = np.random.default_rng(0)
ids = rng.integers(1, 32, (20, 6)).tolist()
rows = [Row(i[:3], [i[3:]], [[True] * 3], [1.0], [True]) for i in ids]
data = Batches(rows, [Bucket(4, 4, 4)], candidates=1, seed=0)
objective = lambda weights, batch, frozen, key: sft_loss(token_logprobs(weights, config, batch), batch)
run = Run(objective, Optimization(30, warmup=3), data)
weights = fit(run, init(specs(config), jax.random.key(0)), Checkpointer(out / "saved", keep=2), every=3,
              report=lambda step, metrics: time.sleep(pause))
np.savez(out / "final.npz", *jax.tree.leaves(weights))
"""


def train(out, pause=0.0):
    return subprocess.Popen([sys.executable, "-c", SCRIPT, str(out), str(pause)])


def leaves(out):
    with np.load(out / "final.npz") as saved:
        return [saved[name] for name in saved.files]


def test_killed_and_resumed_training_ends_with_the_same_bits(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()
    assert train(whole).wait() == 0
    for wanted in (3, 12):  # killed right behind a checkpoint: later updates of the first run are lost
        job = train(cut, pause=0.1)
        deadline = time.monotonic() + 120
        while not (cut / "saved" / str(wanted)).is_dir():
            assert job.poll() is None, "the job ended before it was killed"
            assert time.monotonic() < deadline, f"no checkpoint {wanted}"
            time.sleep(0.02)
        time.sleep(0.15)
        os.kill(job.pid, signal.SIGKILL)
        assert job.wait() == -signal.SIGKILL
    assert train(cut).wait() == 0
    for a, b in zip(leaves(whole), leaves(cut), strict=True):
        assert np.array_equal(a, b), "resumed weights differ"
