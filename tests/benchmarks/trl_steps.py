"""One epoch of DPO, one of critic training and GRPO steps: jraggym beside TRL, from the same weights and rollouts.

    python3 -m venv ../trl && . ../trl/bin/activate && pip install torch==2.13.0 && pip install -e . 'trl>=1.16,<2'
    python tests/benchmarks/trl_steps.py [--states 12] [--sizes 1 2 4 8]

TRL has an environment of its own, so that it cannot change what the tests run with. Weights are a random Llama's and
token ids are random. Rewards follow the rank rule 1 / (1 + rank): one good and eight bad candidates of ten. TRL gets
what the reference feeds it: each (prompt, chosen, rejected) written out, through DPOTrainer and RewardTrainer. A GRPO
step is the optimisation on given completions with given log-probabilities of the old policy and of the reference,
without generation on either side: loop and loss of GRPOTrainer beside our jitted step.

Both sides make the same updates on the same states: AdamW, clipped gradients, float32, no dropout, as many threads.
Each has its fastest settings. TRL keeps all activations, and puts the best of `--sizes` sequences or pairs through the
model at one time (tried on two updates), accumulating gradients to the same updates; jraggym keeps the products with
weights alone (`--remat`). Each measurement is a process of its own, and the fastest of `--repeats` counts. The first
update, which compiles or warms up, is timed apart, and its loss must agree on both sides. The peak is of the whole
process, compiler included. Nothing is asserted on time.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

HERE = Path(__file__).resolve().parent
TOLERANCE = 1e-5
NAMES = {"dpo": "DPO, one epoch", "critic": "critic, one epoch", "grpo": "GRPO, one step"}
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True)
class Config:
    """Sizes of the problem and of the model."""

    tasks: tuple[str, ...] = ("dpo", "critic", "grpo")
    states: int = 12  # in the epoch; the warm-up takes as many more as an update
    rows: int = 1  # states in an update
    prompt: int = 1024
    candidates: int = 10
    group: int = 8  # the candidates that GRPO reads
    action: int = 64
    hidden: int = 128
    layers: int = 2
    heads: int = 4
    feed_forward: int = 384
    vocab: int = 1024
    beta: float = 0.1  # of DPO
    centre: float = 0.01  # of the critic
    kl: float = 0.04  # of GRPO: weight of the k3 estimate
    clip: float = 0.2  # of GRPO
    rate: float = 1e-4
    remat: str = "dots"  # what jraggym's backward pass recomputes: "none", "dots" or "layer"
    sizes: tuple[int, ...] = (1, 2, 4, 8)  # sequences or pairs that go through TRL's model at one time
    repeats: int = 3  # the fastest run of each side counts
    seed: int = 0


def write_problem(folder: Path, config: Config) -> None:
    """Random ids, all of full length; 0 pads and 1 ends an action."""
    rng = np.random.default_rng(config.seed)
    count, k = config.states + config.rows, config.candidates
    action = rng.integers(2, config.vocab, (count, k, config.action), dtype=np.int32)
    action[:, :, -1] = 1
    reward = 1 / (1 + rng.permuted(np.tile(np.arange(k), (count, 1)), axis=1))
    group = reward[:, : config.group]
    advantage = (group - group.mean(1, keepdims=True)) / (group.std(1, ddof=1, keepdims=True) + 1e-6)
    np.savez(
        folder / "problem.npz",
        prompt=rng.integers(2, config.vocab, (count, config.prompt), dtype=np.int32),
        action=action,
        reward=reward.astype(np.float32),
        advantage=advantage.astype(np.float32),
    )
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config)))


def call(module: str, function: str, folder: Path, *arguments: Any) -> Any:
    """The result of a function of one side, run in a process of its own."""
    given = ", ".join(map(repr, (str(folder), *arguments)))
    code = (
        f"import json, pathlib, {module} as side; P = pathlib.Path; a = ({given},); "
        f"r = side.{function}(P(a[0]), *a[1:]); P(a[0], 'result.json').write_text(json.dumps(r))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=HERE, env={**os.environ, **OFFLINE}, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{module}.{function} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return json.loads((folder / "result.json").read_text())


def report(task: str, config: Config, ours: dict[str, Any], peer: dict[str, Any]) -> float:
    """Prints one task's rows and returns the difference of the losses."""
    updates = config.states // config.rows if task == "grpo" else 1  # GRPO's figures are those of one step
    print(f"\n{NAMES[task]} ({config.states // config.rows} updates timed)")
    print(f"  {'':<10}{'tokens':>11}{'seconds':>10}{'first update':>14}{'peak MiB':>10}{'at start':>10}{'loss':>12}")
    for name, side in (("jraggym", ours), ("TRL", peer)):
        print(
            f"  {name:<10}{side['tokens'] // updates:>11,}{side['seconds'] / updates:>10.2f}{side['warmup']:>14.2f}"
            f"{side['peak']:>10.0f}{side['before']:>10.0f}{side['loss']:>12.6f}"
        )
    ratios = [f"{peer[name] / ours[name]:.1f} x the {name}" for name in ("tokens", "seconds", "peak")]
    difference = abs(ours["loss"] - peer["loss"])
    print(f"  TRL: {', '.join(ratios)}; {peer['size']} at one time; the losses differ by {difference:.1e}", flush=True)
    return difference


def main() -> None:
    config = tyro.cli(Config, description=__doc__)
    if importlib.util.find_spec("trl") is None:
        raise SystemExit("error: TRL is not installed here\n  remedy: see --help for its environment")
    if config.states % config.rows or config.group > config.candidates:
        raise SystemExit(
            f"error: --states must be a multiple of --rows, and --group at most --candidates\n  got: {config}"
        )
    differences: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_problem(folder, config)
        call("trl_peer", "prepare", folder)
        for task in config.tasks:
            size = call("trl_peer", "fastest", folder, task, list(config.sizes))
            sides = [("trl_ours", ()), ("trl_peer", (size, config.states // config.rows))] * config.repeats
            runs = [call(module, "measure", folder, task, *rest) for module, rest in sides]
            ours, peer = (min(runs[side::2], key=lambda run: run["seconds"]) for side in (0, 1))
            if not differences:
                print(f"{ours['version']} on {ours['threads']} threads; {peer['version']} on {peer['threads']} threads")
            differences[task] = report(task, config, ours, peer)
    if bad := [task for task, difference in differences.items() if not difference < TOLERANCE]:
        raise SystemExit(f"error: the first losses differ by {TOLERANCE:.0e} or more: {', '.join(bad)}")


if __name__ == "__main__":
    main()
