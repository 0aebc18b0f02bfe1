"""Jobs that give the same on any number of hosts, for test_hosts to run in one process and in several."""

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
from array_samples import random_weights
from toy_world import ACTIONS, Watched, toy_codec, toy_examples, toy_retriever

from jraggym.checkpoint import Checkpointer
from jraggym.data.process import ProcessRecord, Provenance, build_dataset, open_dataset
from jraggym.episodes import Rules
from jraggym.experience import GRPO
from jraggym.gathering import Gatherer
from jraggym.hosts import fetch, lead, share
from jraggym.labelling import support_judge
from jraggym.models.decoder import DecoderConfig, specs
from jraggym.onpolicy import OnPolicy, Schedule, train_on_policy
from jraggym.recipes import bench
from jraggym.recipes.bench import Bench
from jraggym.recipes.experiment import Placed, critic_on, critic_table
from jraggym.recipes.offline import held_out, judge_agreement, with_reference
from jraggym.recipes.quickstart import preferences, shuffled, successful
from jraggym.recipes.settings import Settings
from jraggym.retrieval.sharded import ShardedRetriever
from jraggym.rollout import Rollout
from jraggym.sampling import Sampling
from jraggym.sharding import make_mesh, place, shardings, whole_on
from jraggym.steps import Network, dpo
from jraggym.text.batching import Batches, Bucket, Row
from jraggym.training import Optimization, Run, fit
from jraggym.types import Candidate, State

CONFIG = DecoderConfig(vocab=16, model=16, layers=1, query_heads=4, kv_heads=4, head_dim=4, feed_forward=32)
ADAMW = Optimization(4, matrix_rate=0.0, rate=3e-3, warmup=0, schedule="constant")
SETTINGS = Settings(model=CONFIG, max_prompt=12, max_action=4, contrasts=3, states=8)
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
    batches = Batches(preference_rows(), [Bucket(8, 8, 5)], candidates=3, seed=0)
    run = Run(dpo(Network(CONFIG, mesh=mesh)), ADAMW, batches, frozen=weights, mesh=mesh)

    def report(step, metrics):
        losses.append(float(metrics["loss"]))

    trained = fit(run, weights, Checkpointer(folder), every=2, report=report)
    return {"losses": np.array(losses), **leaves(trained)}


def improve(mesh):
    """Two iterations of GRPO on rollouts that search, on another mesh; also what each process retrieved and judged."""
    there = make_mesh(1, 2, 2, list(mesh.devices.flat)[::-1])
    retriever, judged = Watched(toy_retriever()), Counter()

    def judge(example, *rest):
        judged[example.id] += 1
        return support_judge(example, *rest)

    rollout = Rollout(CONFIG, toy_codec(), retriever, Sampling(3, 4), Rules(3, "reward", judge), batch=8, mesh=there)
    gather = Gatherer(rollout, toy_codec(), toy_examples(12), 6, jax.random.key(1))
    plan = Schedule(iterations=2, updates=1, rows=8, epochs=1, prompt=96, action=4, candidates=3)
    weights, seen = start(mesh), []
    net = Network(CONFIG, mesh=mesh)
    job = OnPolicy(net, GRPO(), ADAMW, gather, plan, weights, mesh=mesh, rollout_mesh=there)
    state = train_on_policy(job, weights, report=lambda i, metrics: seen.append(metrics))
    work = share((sum(1 for call in retriever.calls for query in call if query), sum(judged.values())))
    metrics = {f"metric {name}": np.array([m[name] for m in seen]) for name in seen[0]}
    return {"work": np.array(work), **metrics, **leaves(state.policy.weights)}


def leaves(weights):
    found = jax.tree_util.tree_leaves_with_path(fetch(weights))
    return {f"weights {jax.tree_util.keystr(path)}": np.asarray(leaf) for path, leaf in found}


def search_sharded(mesh):
    """((vectors, queries), positions of the nine best of 203 vectors, many of them alike, spread over the mesh)."""
    rng = np.random.default_rng(0)
    vectors, queries = (rng.normal(size=(n, 24)).astype(np.float32) for n in (203, 17))
    vectors[[30, 77, 150, 202]] = vectors[5]
    queries[3], queries[4] = vectors[5], 0
    tower = SimpleNamespace(params=(), apply=lambda params, ids, mask: ids)
    encoder = SimpleNamespace(query=tower, similarity="dot")
    index = ShardedRetriever(range(203), encoder, vectors, mesh, k=9)
    return (vectors, queries), np.asarray(jax.jit(index.encode)((), place(queries, whole_on(mesh)), None))


def stored_records(folder):
    """A dataset of 30 states, of which some are of failed episodes and some have nothing to prefer."""
    records = [
        ProcessRecord(
            example.id,
            0,
            State(example.question),
            "prompt",
            example.answers,
            tuple(Candidate(text, reward) for text, reward in zip(ACTIONS[:3], (i % 5 != 0, 0.0, 0.25), strict=True)),
            0,
            em=float(i % 4 != 0),
            f1=float(i % 4 != 0),
            provenance=Provenance("actor", "judge", "retriever", 0),
        )
        for i, example in enumerate(toy_examples(30))
    ]
    build_dataset(folder / "dataset", records)


def stored(mesh, folder, out):
    """Two steps of DPO on that dataset with a kept reference, and a critic's agreement.

    `work` tells which records each process read, to survey them and to train: bool [processes, 2, records].
    """
    bench.KEPT = 0  # so that each use of a row is a read
    shop = Bench(SETTINGS, toy_codec().tokenizer, out, lambda *told: None)
    records, weights, losses, work = Reads(open_dataset(folder / "dataset")), start(mesh), [], []
    net = Network(CONFIG, mesh=mesh)
    ready = Placed(net, weights, weights, mesh)
    rows = with_reference(shop, ready, preferences(shop, successful(records)))
    work.append(records.taken())
    run = Run(dpo(net), replace(ADAMW, steps=2), shuffled(shop, rows), frozen=weights, mesh=mesh)
    trained = fit(run, weights, report=lambda step, metrics: losses.append(float(metrics["loss"])))
    work.append(records.taken())
    learn, held = held_out(records)
    critic = critic_on(ready, critic_table(net), jax.random.key(3))
    told = judge_agreement(shop, ready, critic, preferences(shop, learn))
    del told["by_distance"]
    told |= {"rows": len(rows), "learn": len(learn), "held": len(held), "losses": losses}
    return {"work": np.array(share(work)), **{name: np.array(value) for name, value in told.items()}, **leaves(trained)}


class Reads:
    """A dataset that notes which of its records are read."""

    def __init__(self, source):
        self._source, self._numbers = source, set()

    def __len__(self):
        return len(self._source)

    def __getitem__(self, index):
        self._numbers.add(int(index))
        return self._source[index]

    def __iter__(self):
        return map(self.__getitem__, range(len(self)))

    def taken(self):
        """Which were read since this was last asked."""
        found = [i in self._numbers for i in range(len(self))]
        self._numbers.clear()
        return found


def equal(folder):
    """What several hosts give, written by the first; `resumed` goes on from another job's checkpoint."""
    mesh = make_mesh(*MESHES[jax.device_count()])
    found = {
        "whole": prefer(mesh, folder / "whole"),
        "resumed": prefer(mesh, folder / "resumed"),
        "search": {"found": search_sharded(mesh)[1]},
    }
    if jax.process_count() == 2:
        found["policy"] = improve(mesh)
        found["stored"] = stored(mesh, folder, folder)
    if lead():
        for name, arrays in found.items():
            np.savez(folder / f"{name}.npz", **arrays)
