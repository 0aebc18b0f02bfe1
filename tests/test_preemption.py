"""Jobs that are ended again and again, at any moment, end with the bits and the curves of uninterrupted ones."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from preempted_jobs import KINDS, STEPS

from jraggym.errors import PREEMPTED
from jraggym.history import History
from jraggym.host_calls import HostCalls
from jraggym.preemption import Preempted, preemptible, should_stop, stop_if_asked
from train.job import Logbook

TESTS = Path(__file__).parent
KILLS = {"sft": 4, "dpo": 3, "critic": 3, "lora": 4, "grpo": 3, "ppo": 3}  # 20 in all
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
    pid = jobs.begin(kind, out)
    for _ in range(rng.randint(1, 5)):
        if (line := jobs.next()).startswith("exit"):
            assert line == "exit 0", (out / "stderr").read_text()
            return "whole"
    time.sleep(rng.uniform(0.0, 0.02))
    if inside:
        until = time.monotonic() + 60  # what the job tells meanwhile waits in the pipe
        while not saving(out) and not (out / "final.npz").exists() and time.monotonic() < until:
            time.sleep(0.001)
    os.kill(pid, number_of_signal)
    code = jobs.end()
    if code == 0:
        return "whole"  # the signal came behind the last step
    assert code == (-signal.SIGKILL if number_of_signal == signal.SIGKILL else PREEMPTED), (out / "stderr").read_text()
    return "saving" if number_of_signal == signal.SIGKILL and saving(out) else "running"


def saving(out: Path) -> bool:
    """Whether a checkpoint is being written, or was when the job was killed."""
    return any(out.glob("saved/*.orbax-checkpoint-tmp*"))


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


# ---------------------------------------------------------------- the signal


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_loop_at_its_next_step(number, capsys):
    before, steps = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)], []

    def loop():
        stop_if_asked()
        for step in range(1000):
            if should_stop():
                raise Preempted
            steps.append(step)
            if step == 3:
                os.kill(os.getpid(), number)

    with pytest.raises(SystemExit) as end, preemptible():
        loop()
    assert end.value.code == PREEMPTED == 75
    assert steps == [0, 1, 2, 3]
    assert capsys.readouterr().err == "preempted: what was done is saved; run the same command again to go on\n"
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before
    assert not should_stop(), "a signal is forgotten behind the block"


def test_a_signal_is_heard_inside_a_program_of_the_device():
    """The main thread waits for the program, where Python runs no handler of its own; the rollout is given up."""
    seen = []

    class Host:
        def turn(self, step, rows, x):
            seen.append(step)
            if step == 2:
                os.kill(os.getpid(), signal.SIGTERM)
                until = time.monotonic() + 30
                while not should_stop() and time.monotonic() < until:
                    time.sleep(0.001)
            return (x,)

    calls, rows = HostCalls(lambda name, b: (jax.ShapeDtypeStruct((b,), np.float32),)), jnp.zeros(1, jnp.int32)
    turn = lambda i, x: calls("turn", jnp.int32(i), rows, x)[0]  # noqa: E731
    program = jax.jit(lambda: jax.lax.fori_loop(0, 9, turn, jnp.zeros(1)))
    with pytest.raises(SystemExit) as end, preemptible():
        calls.run(Host(), program)
    assert end.value.code == PREEMPTED
    assert seen == [0, 1, 2]


DEAF = """
import ctypes
from jraggym.preemption import preemptible, should_stop
with preemptible():
    while True:
        print(should_stop(), flush=True)
        ctypes.CDLL(None).sleep(1)  # not in Python, as in a program of the device
"""


def test_a_second_signal_ends_at_once():
    with subprocess.Popen([sys.executable, "-c", DEAF], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "False\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "True\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 128 + signal.SIGINT


HOSTS = """
import sys, time
import jax
from jraggym.preemption import Preempted, preemptible, should_stop
jax.distributed.initialize(f"localhost:{sys.argv[1]}", 2, int(sys.argv[2]))
with preemptible():
    for step in range(3000):
        if should_stop():
            print(step, flush=True)
            raise Preempted
        if step == 20:
            print("ready", flush=True)
        time.sleep(0.02)
"""


def test_hosts_agree_on_the_step():
    """One of two processes gets the signal; both stop at the same step."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    pair = [
        subprocess.Popen(
            [sys.executable, "-c", HOSTS, port, str(i)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for i in range(2)
    ]
    try:
        assert [process.stdout.readline() for process in pair] == ["ready\n"] * 2
        pair[1].send_signal(signal.SIGTERM)
        said = [process.communicate(timeout=90) for process in pair]
    finally:
        for process in pair:
            process.kill()
    assert [process.returncode for process in pair] == [PREEMPTED] * 2, said
    assert said[0][0] == said[1][0], "they stopped at different steps"
    assert 20 < int(said[0][0]) < 2999


# ---------------------------------------------------------------- what was measured


def test_a_history_is_told_again_as_it_was():
    metrics = [{"loss": 0.1}, {"loss": float("nan"), "late": np.float32(1 / 3)}, {"late": jnp.float32(-2e-8)}]
    first, again, seen = History(), [], []
    for step, values in enumerate(metrics[:2], 1):
        first.add(step, values)
    saved = json.loads(json.dumps(first.saved(), allow_nan=False))
    second = History(lambda step, values: again.append((step, values)))
    second.restore(saved)
    second.add(3, metrics[2])
    first.add(3, metrics[2])
    assert repr([(step, values) for step, values in again[:2]]) == repr(
        [(1, {"loss": 0.1}), (2, {"loss": float("nan"), "late": float(np.float32(1 / 3))})]
    )
    assert second.saved() == first.saved()
    History(lambda step, values: seen.append(step)).restore(None)
    assert not seen


def events(folder: Path) -> list[tuple[str, int, float]]:
    """(tag, step, value) of all scalars in TensorBoard's files, in the order they were written."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(folder.glob("events*")):
        content, at = path.read_bytes(), 0
        while at < len(content):  # length, its checksum, the event, its checksum
            size = int.from_bytes(content[at : at + 8], "little")
            event = Event.FromString(content[at + 12 : at + 12 + size])
            found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
            at += 16 + size
    return found


def test_tensorboard_shows_each_step_once(tmp_path):
    def log(until, close):
        book = Logbook(tmp_path, None)
        for step in range(1, until + 1):
            book.write("sft", step, {"loss": np.float32(1 / step)})
        if close:
            book.close()
        return book

    log(9, close=True)
    killed = log(5, close=False)
    log(12, close=True)
    assert events(tmp_path / "tensorboard") == [("sft/loss", s, float(np.float32(1 / s))) for s in range(1, 13)]
    killed.close()


def test_a_logbook_without_a_value_leaves_what_is_there(tmp_path):
    book = Logbook(tmp_path, None)
    book.write("sft", 1, {"loss": 1.0})
    book.close()
    Logbook(tmp_path, None).close()
    assert events(tmp_path / "tensorboard") == [("sft/loss", 1, 1.0)]
