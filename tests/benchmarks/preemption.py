"""The real entries, ended again and again by SIGTERM and SIGKILL at random moments, beside uninterrupted ones.

    python tests/benchmarks/preemption.py --out /tmp/kills [--entries sft collect dpo] [--kills 5] [--seed 0]

Runs each entry once to its end, and once more in pieces with `kills` ends; a run's time decides when they come. Prints
what each piece's exit code was, and compares results.json (without times), the model's checksums and TensorBoard's
scalars; exits with 1 where anything differs. All entries together take a quarter of an hour on two cores.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from test_preemption import events  # noqa: E402

SMALL = {
    **{"demonstrations": 300, "collected": 20, "development": 6, "test": 6, "vocab": 700, "vector": 32},
    **{"candidates": 4, "contrasts": 3, "states": 2, "episodes": 8, "short-first": 0, "tokens": 800},
    **{"model.model": 32, "model.layers": 2, "model.query-heads": 2, "model.kv-heads": 2, "model.head-dim": 16},
    "model.feed-forward": 64,
}
SCHEDULE = {"iterations": 8, "updates": 1, "rows": 4, "candidates": 4}
TIMES = ("seconds", "stages", "created", "config")  # of results.json, the last with the command


def flags(values: dict, prefix: str = "") -> list[str]:
    return [part for name, value in values.items() for part in (f"--{prefix}{name}", str(value))]


def commands(done: Path) -> dict[str, list[str]]:
    """Each entry's module and arguments; later ones read what the earlier ones left in `done`."""
    small, few = flags(SMALL, "settings."), flags({"optimization.steps": 40, "every": 10})
    model, data = ["--model", f"{done}/sft/model"], ["--data", f"{done}/label/labels/random/dataset"]
    schedule = [*flags(SCHEDULE, "schedule."), *flags({"questions": 8, "slots": 4, "every": 2})]
    scored = ["--critic", f"{done}/critic/model"]
    unlabelled = ["--data", f"{done}/collect/data/data/dataset", "--rewards", "random"]
    return {
        "sft": ["train.sft", "synthhop", *small, *few],
        "collect": ["train.collect", "synthhop", *small, *model, "--questions", "64"],
        "label": ["train.label", "synthhop", *small, *model, *unlabelled],
        "dpo": ["train.dpo", "synthhop", *small, *few, *model, *data],
        "lora": ["train.dpo", "synthhop", *small, *few, *model, *data, "--lora.rank", "2"],
        "critic": ["train.critic", "synthhop", *small, *few, *model, *data],
        "grpo": ["train.grpo", "synthhop-outcome", *small, *model, *schedule],
        "ppo": ["train.ppo", "synthhop-critic", *small, *model, *schedule, *scored],
        "quickstart": ["train.quickstart", "--smoke"],
    }


@dataclass(frozen=True)
class Arguments:
    """Ends real jobs."""

    out: Path
    entries: tuple[str, ...] = ("sft", "collect", "label", "dpo", "lora", "critic", "grpo", "ppo", "quickstart")
    kills: int = 5
    seed: int = 0


def begin(command: list[str], out: Path) -> subprocess.Popen:
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.with_suffix(".log").open("a") as log:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(
            [sys.executable, "-m", *command, "--out", str(out)], cwd=ROOT, env=environment, stdout=log, stderr=log
        )


def found(out: Path) -> dict:
    """What has to be the same."""
    text = (out / "results.json").read_text().replace(str(out), "OUT")
    results = {name: value for name, value in json.loads(text).items() if name not in TIMES}
    index = out / "model" / "weights" / "0" / "index" / "metadata"
    model = json.loads(index.read_text()) if index.exists() else None
    curves: dict[str, list] = {}
    for tag, step, value in events(out / "tensorboard"):
        curves.setdefault(tag, []).append((step, value))
    return {"results": results, "model": model, "curves": curves}


def main(arguments: Arguments) -> None:
    rng, whole, cut, failed = random.Random(arguments.seed), arguments.out / "whole", arguments.out / "cut", []
    for name in arguments.entries:
        command, start = commands(whole)[name], time.monotonic()
        if (code := begin(command, whole / name).wait()) != 0:
            raise SystemExit(f"{name} ended with {code}: see {whole / name}.log")
        seconds, codes = time.monotonic() - start, []
        for _ in range(arguments.kills):
            job = begin(command, cut / name)
            try:
                codes.append(job.wait(rng.uniform(0.2, 0.9) * seconds))
                break
            except subprocess.TimeoutExpired:
                job.send_signal(rng.choice([signal.SIGTERM, signal.SIGKILL]))
                codes.append(job.wait(120))
        codes.append(begin(command, cut / name).wait())
        same = codes[-1] == 0 and found(whole / name) == found(cut / name)
        print(f"{name:12} {seconds:5.0f} s  exit codes {codes}  {'the same' if same else 'DIFFERENT'}", flush=True)
        if not same:
            failed.append(name)
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
