"""Jobs that give the same on any number of hosts, for test_hosts to run in one process and in several.

python tests/host_jobs.py JOB FOLDER --address 127.0.0.1:PORT --number N --process I [--timeout SECONDS]
"""

import argparse
import dataclasses
import os
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import jax
import numpy as np
from array_samples import random_weights
from toy_world import Watched, toy_codec, toy_examples, toy_retriever

from jraggym.checkpoint import Checkpointer
from jraggym.episodes import Rules
from jraggym.errors import InputError
from jraggym.experience import GRPO
from jraggym.gathering import Gatherer
from jraggym.hosts import Hosts, connect, fetch, lead, share
from jraggym.labelling import support_judge
from jraggym.models.decoder import DecoderConfig, specs
from jraggym.objectives.policy import PolicyLoss
from jraggym.onpolicy import OnPolicy, Schedule, train_on_policy
from jraggym.rollout import Rollout
from jraggym.sampling import Sampling
from jraggym.sharding import make_mesh, place, shardings
from jraggym.steps import Network, dpo
from jraggym.text.batching import Batches, Bucket, Row
from jraggym.training import Optimization, Run, fit

CONFIG = DecoderConfig(vocab=16, model=16, layers=1, query_heads=4, kv_heads=4, head_dim=4, feed_forward=32)
ADAMW = Optimization(4, matrix_rate=0.0, rate=3e-3, warmup=0, schedule="constant")
MESHES = {4: (2, 2, 1), 8: (2, 2, 2)}  # devices: data, fsdp, tensor


def start(mesh):
    return place(random_weights(specs(CONFIG)), shardings(specs(CONFIG), mesh))


def preference_rows():
    """Rows of all lengths, each with a good and a bad candidate."""
    rng = np.random.default_rng(0)

    def ids(most):
        return rng.integers(3, CONFIG.vocab, rng.integers(1, most + 1)).tolist()

    rows = []
    for _ in range(24):
        actions = [ids(5) for _ in range(3)]
        rows.append(Row(ids(8), actions, [[True] * len(a) for a in actions], [1.0, 0.0, 0.25], [True] * 3))
    return rows


def prefer(mesh, folder):
    """DPO with a checkpoint after every second of four steps; goes on from what is in `folder`."""
    weights, losses = start(mesh), []
    batches = Batches(preference_rows(), [Bucket(8, 4, 5), Bucket(8, 8, 5)], candidates=3, seed=0)
    run = Run(dpo(Network(CONFIG, mesh=mesh)), ADAMW, batches, frozen=weights, mesh=mesh)
    report = lambda step, metrics: losses.append(float(metrics["loss"]))
    trained = fit(run, weights, Checkpointer(folder), every=2, report=report)
    return {"losses": np.array(losses), **leaves(trained)}


def improve(mesh):
    """Two iterations of GRPO on rollouts that search; also how much each process retrieved and judged."""
    retriever, judged = Watched(toy_retriever()), Counter()

    def judge(example, *rest):
        judged[example.id] += 1
        return support_judge(example, *rest)

    rollout = Rollout(CONFIG, toy_codec(), retriever, Sampling(3, 4), Rules(3, "reward", judge), batch=8, mesh=mesh)
    gather = Gatherer(rollout, toy_codec(), toy_examples(12), 6, jax.random.key(1))
    plan = Schedule(iterations=2, updates=1, rows=8, epochs=1, prompt=96, action=4, candidates=3)
    weights, seen = start(mesh), []
    job = OnPolicy(
        Network(CONFIG, mesh=mesh), GRPO(loss=PolicyLoss(kl_weight=0.01)), ADAMW, gather, plan, weights, mesh=mesh
    )
    state = train_on_policy(job, weights, report=lambda i, metrics: seen.append(metrics))
    work = share((sum(1 for call in retriever.calls for query in call if query), sum(judged.values())))
    metrics = {f"metric {name}": np.array([m[name] for m in seen]) for name in seen[0]}
    return {"work": np.array(work), **metrics, **leaves(state.policy.weights)}


def leaves(weights):
    found = jax.tree_util.tree_leaves_with_path(fetch(weights))
    return {f"weights {jax.tree_util.keystr(path)}": np.asarray(leaf) for path, leaf in found}


def mesh_of_all():
    return make_mesh(*MESHES[jax.device_count()])


def equal(folder):
    """What several hosts give, written by the first; `resumed` goes on from another job's checkpoint."""
    mesh = mesh_of_all()
    found = {"whole": prefer(mesh, folder / "whole"), "policy": improve(mesh)}
    if (folder / "resumed").exists():
        found["resumed"] = prefer(mesh, folder / "resumed")
    if lead():
        for name, arrays in found.items():
            np.savez(folder / f"{name}.npz", **arrays)


def die(folder):
    """The last process is killed in the middle of the others' collectives."""
    for i in range(10_000):
        if i == 3 and jax.process_index() == int(os.environ["DYING"]):
            os.kill(os.getpid(), getattr(signal, os.environ.get("BY", "SIGKILL")))
        share(i)
        time.sleep(0.05)


def fail(folder):
    """The last process stops with an error while the others wait for it."""
    if jax.process_index() == jax.process_count() - 1:
        raise InputError("no room", got="0 bytes", remedy="Make some.")
    share(None)


def refuse(folder):
    """All processes find the same fault."""
    raise InputError("no such data", got="none", remedy="Name another.")


def meet(folder):
    sys.stdout.write(f"{share(jax.process_index())}\n")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("job")
    parser.add_argument("folder", type=Path)
    for field in dataclasses.fields(Hosts):
        parser.add_argument(f"--{field.name}", type={"address": str, "timeout": float}.get(field.name, int))
    given = vars(parser.parse_args())
    job, folder = given.pop("job"), given.pop("folder")
    with connect(Hosts(**{name: value for name, value in given.items() if value is not None})):
        globals()[job](folder)


if __name__ == "__main__":
    main()
