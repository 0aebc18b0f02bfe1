"""Jobs that are ended again and again, at any moment, end with the bits and the curves of uninterrupted ones."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from preempted_jobs import KINDS, STEPS

from jraggym.errors import InputError
from jraggym.history import History
from jraggym.host_calls import HostCalls
from jraggym.preemption import EXIT_CODE, Preempted, preemptible, should_stop, stop_if_asked

TESTS = Path(__file__).parent
KILLS = {"sft": 3, "dpo": 3, "critic": 3, "lora": 3, "grpo": 4, "ppo": 4}  # 20 in all
assert set(KILLS) == set(KINDS)


class Jobs:
    """The process that forks the jobs."""

    def __init__(self, cache: Path):
        path = os.pathsep.join([str(TESTS.parent), str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
        command = [sys.executable, str(TESTS / "preempted_jobs.py"), str(cache)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(command, **pipes, text=True, env={**os.environ, "PYTHONPATH": path})

    def begin(self, kind: str, out: Path) -> int:
        """The process id of a new life of a job."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{kind} {out}\n")
        self.process.stdin.flush()
        return int(self.next().removeprefix("pid "))

    def next(self) -> str:
        """What the job does next: call, step, done or exit CODE."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        assert line, "the jobs' process has ended"
        return line

    def run(self, kind: str, out: Path) -> int:
        """The exit code of a life that nobody ends."""
        self.begin(kind, out)
        return self.end()

    def end(self) -> int:
        """The exit code of the present life."""
        while not (line := self.next()).startswith("exit "):
            pass
        return int(line.removeprefix("exit "))


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    started = Jobs(tmp_path_factory.mktemp("compiled"))
    yield started
    started.process.stdin.close()
    started.process.stdout.close()
    started.process.wait(60)


def ended(jobs: Jobs, kind: str, out: Path, rng: random.Random, number: int) -> str:
    """Ends one life of a job at a random moment: where it was, or "whole" if it came to its end before that."""
    number_of_signal, inside = (signal.SIGKILL, signal.SIGTERM)[number % 2], number in (1, 2)
    pid, place = jobs.begin(kind, out), "running"
    for _ in range(rng.randint(1, 5)):
        if (line := jobs.next()).startswith("exit"):
            assert line == "exit 0"
            return "whole"
    time.sleep(rng.uniform(0.0, 0.02))
    if inside:
        # The job lives on meanwhile; its events wait in the pipe.
        until = time.monotonic() + 10
        while time.monotonic() < until and not list(out.glob("saved/*.orbax-checkpoint-tmp*")):
            if (out / "final.npz").exists():
                break
            time.sleep(0.0005)
    os.kill(pid, number_of_signal)
    code = jobs.end()
    if code == 0:
        return "whole"  # the signal came behind the last step
    assert code == (-signal.SIGKILL if number_of_signal == signal.SIGKILL else EXIT_CODE), (out / "stderr").read_text()
    if number_of_signal == signal.SIGKILL and list(out.glob("saved/*.orbax-checkpoint-tmp*")):
        place = "saving"
    return place


def arrays(out: Path) -> list[np.ndarray]:
    with np.load(out / "final.npz") as saved:
        return [saved[name] for name in saved.files]


def index(out: Path) -> dict:
    """What the last checkpoint tells of itself: step, history, and a checksum of each array of the whole state."""
    last = max((out / "saved").iterdir(), key=lambda path: int(path.name))
    return json.loads((last / "index" / "metadata").read_text())


@pytest.mark.parametrize("kind", KINDS)
def test_a_job_that_is_ended_again_and_again_ends_with_the_same_bits(kind, jobs, tmp_path):
    rng, whole, cut = random.Random(kind), tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()
    assert jobs.run(kind, whole) == 0, (whole / "stderr").read_text()
    places = [ended(jobs, kind, cut, rng, number) for number in range(KILLS[kind])]
    assert "whole" not in places, f"the job was too quick to be ended so often: {places}"
    assert "saving" in places, "no kill came inside the writing of a checkpoint"
    assert jobs.run(kind, cut) == 0, (cut / "stderr").read_text()
    assert all(np.array_equal(a, b) for a, b in zip(arrays(whole), arrays(cut), strict=True)), "other bits"
    assert index(whole) == index(cut), "another state or another history in the last checkpoint"
    told = json.loads((cut / "told.json").read_text())
    assert told == json.loads((whole / "told.json").read_text()), "other metrics than without interruption"
    count = STEPS if kind in ("sft", "dpo", "critic", "lora") else STEPS // 2
    assert [step for step, _ in told] == list(range(1, count + 1)), "each step is told once, in order"
    said = (cut / "stderr").read_text().splitlines()
    assert said == ["preempted: what was done is saved; run the same command again to go on"] * (KILLS[kind] // 2)
