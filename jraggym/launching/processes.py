"""Processes that run together, commands whose output is read, and starting again after a preemption."""

from __future__ import annotations

import itertools
import os
import queue
import re
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO, NamedTuple, TypeVar

import tenacity

from jraggym.errors import LOST, PREEMPTED

TAIL = 20  # lines of a log that an error repeats
CALLS, PAUSE = 5, 2.0  # attempts of a command that fails in a passing way; seconds before the second one, about
PASSING = re.compile(r"\b(UNAVAILABLE|DEADLINE_EXCEEDED|INTERNAL|ABORTED)\b|per minute|Connection reset|timed out")

Report = Callable[[str], None]
Result = TypeVar("Result")


class LaunchError(RuntimeError):
    """A launch that failed: what happened, with the end of the log and what to do, and an exit code for the entry."""

    def __init__(self, what: str, code: int = 1):
        super().__init__(what)
        self.code = code


class Preempted(LaunchError):
    """The machines were taken away, or the command says that it wants to be run again."""

    def __init__(self, what: str):
        super().__init__(what, PREEMPTED)


class Stopped(LaunchError):
    """A signal to the launcher ended it; the same launch goes on from there."""

    def __init__(self, what: str):
        super().__init__(what, PREEMPTED)


class CommandFailed(LaunchError):
    """A command whose output is read failed; `output` is all that it wrote."""

    def __init__(self, argv: Sequence[str], code: int, output: str):
        super().__init__(f"{' '.join(argv[:6])} ... ended with exit code {code}:\n{tail_of(output.splitlines())}")
        self.output = output


class Ended(NamedTuple):
    """How a group of processes ended: the exit code of the first that failed, else 0, its name and last lines."""

    code: int
    name: str
    tail: tuple[str, ...]


def tail_of(lines: Sequence[str]) -> str:
    """The last lines, indented, for an error."""
    return "\n".join(f"    {line}" for line in list(lines)[-TAIL:])


def call(argv: Sequence[str]) -> str:
    """What a command writes to stdout; one that fails in a passing way is called again, so it must be idempotent.

    Raises CommandFailed.
    """

    def once() -> str:
        done = subprocess.run(argv, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL)
        if done.returncode:
            raise CommandFailed(argv, done.returncode, done.stderr + done.stdout)
        return done.stdout

    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception(lambda e: isinstance(e, CommandFailed) and bool(PASSING.search(e.output))),
        stop=tenacity.stop_after_attempt(CALLS),
        wait=tenacity.wait_random_exponential(PAUSE, 60),
        reraise=True,
    )
    return retrying(once)


def with_restarts(
    start: Callable[[int], Result], restarts: int, report: Report, *, backoff: float = 10.0, longest: float = 600.0
) -> Result:
    """What start(0) gives; each time that it raises Preempted, start(1), start(2) ... after a pause.

    The pause is `backoff` seconds and doubles, up to `longest`, as long as no start lasts longer than that.
    Raises Preempted when it happens once more than `restarts` times.
    """
    attempts, pauses = itertools.count(), itertools.count()
    began = time.monotonic()

    def once() -> Result:
        nonlocal began
        began = time.monotonic()
        return start(next(attempts))

    def pause(_: tenacity.RetryCallState) -> float:
        nonlocal pauses
        if time.monotonic() - began > longest:
            pauses = itertools.count()
        return min(backoff * 2 ** next(pauses), longest)

    def tell(state: tenacity.RetryCallState) -> None:
        why = state.outcome.exception() if state.outcome else None
        report(f"{why}; restart {state.attempt_number} of {restarts} in {state.upcoming_sleep:.0f} s")

    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(Preempted),
        stop=tenacity.stop_after_attempt(restarts + 1),
        wait=pause,
        before_sleep=tell,
        reraise=True,
    )
    return retrying(once)


def run_together(
    commands: Mapping[str, Sequence[str]],
    show: Report,
    *,
    environment: Mapping[str, str] | None = None,
    grace: float = 0.0,
    patience: float = 120.0,
) -> Ended:
    """Runs commands side by side and shows their output, each line behind its process's name.

    When one fails, the others have `grace` seconds to end by themselves, then get SIGTERM, then after `patience`
    seconds SIGKILL. A SIGTERM or SIGINT to this process goes to each of them once, as SIGTERM. Raises Stopped after it.
    """
    lines: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()
    tails: dict[str, deque[str]] = {name: deque(maxlen=TAIL) for name in commands}
    full = {**os.environ, **(environment or {})}
    first, deadline, ended = Ended(0, "", ()), float("inf"), False
    with _signals() as received:
        running = {name: _spawn(argv, full) for name, argv in commands.items()}
        readers = [threading.Thread(target=_read, args=(n, p.stdout, lines), daemon=True) for n, p in running.items()]
        for reader in readers:
            reader.start()
        try:
            while open_ := {name: p for name, p in running.items() if p.poll() is None}:
                _show(lines, tails, show)
                failed = [name for name, p in running.items() if p.poll()]
                failed.sort(key=lambda name: running[name].returncode == LOST)  # that one tells of another's end
                if failed and not first.code:
                    first = Ended(_code(running[failed[0]]), failed[0], ())
                    if not ended:  # those that have been told to end save for as long as `patience`
                        deadline = min(deadline, time.monotonic() + grace)
                if received and not ended:
                    deadline = time.monotonic()
                if time.monotonic() >= deadline:
                    _signal_all(open_, signal.SIGKILL if ended else signal.SIGTERM)
                    ended, deadline = True, time.monotonic() + patience
                time.sleep(0.05)
        finally:
            _signal_all({name: p for name, p in running.items() if p.poll() is None}, signal.SIGKILL)
            for process in running.values():
                process.wait()
            for reader in readers:
                reader.join(timeout=5)
            _show(lines, tails, show)
        if received:
            codes = ", ".join(f"{name} {_code(p)}" for name, p in running.items())
            raise Stopped(f"ended by {signal.Signals(received[0]).name}; exit codes: {codes}")
    if not first.code:  # those that failed in the last moment
        first = next((Ended(_code(p), n, ()) for n, p in running.items() if p.returncode), first)
    return first._replace(tail=tuple(tails.get(first.name, ())))


def _spawn(argv: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        argv,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # so that Ctrl-C reaches each of them once, through us
    )


def _read(name: str, stream: IO[str] | None, lines: queue.SimpleQueue[tuple[str, str]]) -> None:
    if stream is not None:
        with stream:
            for line in stream:
                lines.put((name, line.rstrip("\n")))


def _show(lines: queue.SimpleQueue[tuple[str, str]], tails: Mapping[str, deque[str]], show: Report) -> None:
    while not lines.empty():
        name, line = lines.get()
        tails[name].append(line)
        show(f"[{name}] {line}" if len(tails) > 1 else line)


def _signal_all(processes: Mapping[str, subprocess.Popen[str]], number: int) -> None:
    for process in processes.values():
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:  # it ended meanwhile
            continue


def _code(process: subprocess.Popen[str]) -> int:
    """The exit code as a shell tells it: 128 + n for one that signal n ended."""
    code = process.returncode
    return 128 - code if code < 0 else code


@contextmanager
def _signals() -> Iterator[list[int]]:
    """The SIGTERM and SIGINT that came inside the block."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # only the main one may set handlers
        yield received
        return
    before = {n: signal.signal(n, lambda number, _: received.append(number)) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
