"""What runs on each worker of a TPU slice: starts a command once, in the background, and shows it to who asks.

    python -m jraggym.launching.worker --folder run --attempt 20260101-120000 -- python -m train.dpo synthhop

A connection that breaks must neither end the training nor start a second one on the same chips, and gcloud itself
repeats a command whose connection broke. So the command belongs to a keeper, a process that outlives the connection;
it holds a lock as long as the command runs. Who calls while it runs sees its log; nothing is started twice. In FOLDER:

    lock                  held by the keeper
    current               the name of the attempt that ran last
    ATTEMPT/log, exit     all that the command wrote; its exit code, once it has ended

Needs nothing but Python's own library.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from jraggym.errors import PREEMPTED

NOTHING = 66  # EX_NOINPUT: there is no command to show
PATIENCE = 120.0  # seconds between SIGTERM and SIGKILL for an attempt that a newer one takes the place of
SHOWN = 20_000  # characters of an older log that one sees who comes later


def attend(folder: Path, attempt: str | None, command: Sequence[str], *, replace: bool = False) -> int:
    """Starts `command` unless this attempt, or another one that still runs, was started before; shows its log.

    `replace` ends another attempt first. Without a command the last attempt is shown. Returns its exit code, 66 when
    there is none to show, 75 when it vanished without one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if command and attempt is not None:
        current = _current(folder)
        if replace and current not in (None, attempt) and _held(folder):
            _end(folder / str(current))
        keeper = [sys.executable, "-m", "jraggym.launching.worker", "--folder", str(folder), "--attempt", attempt]
        with open(folder / "keeper.log", "a") as log:
            process = subprocess.Popen(
                [*keeper, "--keep", "--", *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        while process.poll() is None and _current(folder) != attempt:
            time.sleep(0.02)
    current = _current(folder)
    if current is None:
        _tell("no command was started here")
        return NOTHING
    if attempt is not None and current != attempt:
        _tell(f"attempt {current} still runs: it is shown, and nothing new is started")
    return _follow(folder, folder / current, whole=current == attempt)


def keep(folder: Path, attempt: str, command: Sequence[str]) -> None:
    """Runs `command` to its end, unless a command runs already or this attempt is over."""
    run = folder / attempt
    with open(folder / "lock", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        if run.exists():
            return
        signal.signal(signal.SIGTERM, lambda *_: None)  # it is for the command, whose exit code we wait for
        run.mkdir()
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
        (run / "keeper").write_text(str(os.getpid()))
        with open(run / "log", "ab") as log:
            _write(folder / "current", attempt)
            try:
                code = subprocess.call(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, "PATH": path, "PYTHONUNBUFFERED": "1"},
                )
            except OSError as error:
                log.write(f"cannot start {command[0]}: {error}\n".encode())
                code = 127
        _write(run / "exit", str(128 - code if code < 0 else code))


def _follow(folder: Path, run: Path, *, whole: bool) -> int:
    """Shows the log until the command has ended."""
    with open(run / "log", "rb") as log:
        if not whole and (size := log.seek(0, os.SEEK_END)) >= 0:
            log.seek(max(0, size - SHOWN))
        while True:
            alive = _held(folder) and _current(folder) == run.name
            while part := log.read(1 << 16):
                sys.stdout.buffer.write(part)
                sys.stdout.buffer.flush()
            if not alive:
                break
            time.sleep(0.1)
    if (run / "exit").exists():
        return int((run / "exit").read_text())
    _tell(f"attempt {run.name} vanished without an exit code: the machine restarted, or its memory was used up")
    return PREEMPTED


def _end(run: Path) -> None:
    """Ends an attempt that runs: SIGTERM, which lets it save, and SIGKILL after a while."""
    keeper = int((run / "keeper").read_text())
    _tell(f"attempt {run.name} is ended first")
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(keeper, number)
        except ProcessLookupError:
            return
        deadline = time.monotonic() + PATIENCE
        while _held(run.parent) and time.monotonic() < deadline:
            time.sleep(0.05)
        if not _held(run.parent):
            return


def _held(folder: Path) -> bool:
    """Whether a keeper holds the lock, so a command runs."""
    with open(folder / "lock", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _current(folder: Path) -> str | None:
    path = folder / "current"
    return path.read_text() if path.exists() else None


def _write(path: Path, text: str) -> None:
    building = path.with_name(f".{path.name}.{os.getpid()}")
    building.write_text(text)
    building.replace(path)


def _tell(text: str) -> None:
    sys.stdout.write(f"launch: {text}\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description="Starts a command once and shows its log.")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--attempt")
    parser.add_argument("--replace", action="store_true", help="end another attempt first")
    parser.add_argument("--keep", action="store_true", help="be the keeper")
    parser.add_argument("command", nargs="*")
    given = parser.parse_args()
    if given.keep:
        keep(given.folder, given.attempt, given.command)
    else:
        raise SystemExit(attend(given.folder, given.attempt, given.command, replace=given.replace))


if __name__ == "__main__":
    main()
