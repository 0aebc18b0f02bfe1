"""A small job of every objective, and a process that forks them: each begins with jax imported and compiled programs.

    python tests/preempted_jobs.py CACHE        then lines "KIND FOLDER" on stdin

For each line it forks the job and answers with its process id, then a line for each thing that the job does ("step",
"call", "done"), and at last "exit CODE". The job goes on where the folder's earlier ones ended; when it is whole it
leaves final.npz, all arrays that it has trained, and told.json, the metrics that it has told.
"""

import faulthandler
import json
import os
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from array_samples import TIED, random_batch, random_critic, random_decoder, random_weights

from jraggym import steps
from jraggym.checkpoint import Checkpointer
from jraggym.experience import GRPO, PPO
from jraggym.gathering import Gathered
from jraggym.host_calls import HostCalls
from jraggym.models.lora import Lora, lora_specs
from jraggym.objectives.kl import AdaptiveKL
from jraggym.objectives.policy import PolicyLoss
from jraggym.onpolicy import OnPolicy, Schedule, train_on_policy
from jraggym.preemption import preemptible
from jraggym.text.batching import Batches, Bucket, Row
from jraggym.training import Optimization, Run, fit

STEPS, EVERY, PAUSE = 24, 4, 0.01
LONGEST = 300  # seconds of a life; one that hangs leaves its threads' stacks in stderr and ends with 1
OPTIMIZATION = Optimization(STEPS, matrix_rate=0.0, rate=1e-2, warmup=3)
LORA = Lora(rank=2, dropout=0.1)
ROWS, K, P, A = 2, 3, 6, 4


def tell(event: str) -> None:
    print(event, flush=True)
    time.sleep(PAUSE)


def episodes() -> Batches:
    """Whole episodes, dealt anew in every epoch of three batches."""
    rng = np.random.default_rng(0)
    ids = rng.integers(1, TIED.vocab, (3 * ROWS, P + A)).tolist()
    rows = [Row(one[:P], [one[P:]], [[True] * A], [1.0], [True]) for one in ids]
    return Batches(rows, [Bucket(ROWS, P, A)], candidates=1, seed=0)


class Drawn:
    """Batch `step` is a function of the step alone."""

    def __getitem__(self, step: int) -> Any:
        return random_batch(step, rows=ROWS, candidates=K, prompt=P, action=A)


class Host:
    """A rollout that lasts some calls."""

    def turn(self, step: int, rows: np.ndarray, total: np.ndarray) -> tuple[np.ndarray]:
        tell("call")
        return (total + 0.5,)


CALLS = HostCalls(lambda name, b: (jax.ShapeDtypeStruct((b,), np.float32),))


@jax.jit
def play(embed: jax.Array) -> jax.Array:
    rows = jnp.arange(1, dtype=jnp.int32)
    start = embed.sum()[None]
    return jax.lax.fori_loop(0, 3, lambda step, total: CALLS("turn", jnp.int32(step), rows, total)[0], start)


def gather(policy: Any, iteration: int) -> Gathered:
    """Groups that depend on the policy's last bit, through a program that calls the host."""
    shift = 1e-3 * float(CALLS.run(Host(), lambda: play(policy.actor.embed))[0])
    rng = np.random.default_rng(iteration)
    rows = [
        Row(
            rng.integers(1, TIED.vocab, P).tolist(),
            rng.integers(1, TIED.vocab, (K, A)).tolist(),
            [[True] * A] * K,
            (rng.random(K) + shift).tolist(),
            [True] * K,
            (-3 - rng.random((K, A)) - shift).tolist(),
        )
        for _ in range(ROWS)
    ]
    return Gathered(rows, K * A * ROWS, {"shift": shift})


def offline(objective: Any, weights: Any, out: Path, report: Any, data: Any, matrix_rate: float = 0.0) -> Any:
    run = Run(objective, replace(OPTIMIZATION, matrix_rate=matrix_rate), data, random_decoder(seed=1))
    return fit(run, weights, Checkpointer(out / "saved"), every=EVERY, report=report)


def online(algorithm: Any, out: Path, report: Any) -> Any:
    schedule = Schedule(STEPS // 2, 1, ROWS, 2, P, A, K)
    value = (OPTIMIZATION, random_critic(seed=2)) if isinstance(algorithm, PPO) else (None, None)
    net, start = steps.Network(TIED), jax.tree.map(jnp.asarray, random_decoder())
    job = OnPolicy(net, algorithm, OPTIMIZATION, gather, schedule, random_decoder(seed=1), value[0])
    return train_on_policy(job, start, value[1], Checkpointer(out / "saved"), every=EVERY // 2, report=report)


def work(kind: str, out: Path, report: Any) -> Any:
    """All that the job trains."""
    net, adapted = steps.Network(TIED), steps.Network(TIED, LORA)
    loss = PolicyLoss(kl_weight=0.01)
    jobs = {
        "sft": lambda: offline(steps.sft(net), random_decoder(), out, report, episodes(), 2e-2),  # with Muon
        "dpo": lambda: offline(steps.dpo(net, nll=1.0), random_decoder(), out, report, Drawn()),
        "critic": lambda: offline(steps.critic(net), random_critic(), out, report, Drawn()),
        "lora": lambda: offline(steps.dpo(adapted), random_weights(lora_specs(TIED, LORA)), out, report, Drawn()),
        "grpo": lambda: online(GRPO(loss=loss), out, report),
        "ppo": lambda: online(PPO(adaptive=AdaptiveKL(0.5, horizon=50), loss=loss), out, report),
    }
    return jobs[kind]()


KINDS = ("sft", "dpo", "critic", "lora", "grpo", "ppo")


def life(kind: str, out: Path) -> None:
    """One try at a job, to its end if nobody ends it."""
    told = []

    def report(step: int, metrics: Any) -> None:
        told.append([step, {name: float(value) for name, value in metrics.items()}])
        tell("step")

    trained = work(kind, out, report)
    (out / "told.json").write_text(json.dumps(told))
    np.savez(out / "final.npz", *map(np.asarray, jax.tree.leaves(trained)))
    tell("done")


def child(kind: str, out: Path) -> int:
    """The exit code of a life, as an entry has it."""
    os.dup2(os.open(out / "stderr", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    faulthandler.dump_traceback_later(LONGEST, exit=True)
    try:
        with preemptible():
            life(kind, out)
    except SystemExit as end:
        return int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def main(cache: str) -> None:
    jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    for line in iter(sys.stdin.readline, ""):
        kind, out = line.split(maxsplit=1)
        pid = os.fork()  # jax has begun no thread yet: that comes with the first array
        if pid == 0:
            os._exit(child(kind, Path(out.strip())))
        tell(f"pid {pid}")
        tell(f"exit {os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}")


if __name__ == "__main__":
    main(sys.argv[1])
