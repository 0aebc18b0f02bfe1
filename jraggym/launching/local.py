"""Several processes of one command on this machine, as if each were a host of a pod."""

from __future__ import annotations

import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from jraggym.errors import PREEMPTED, InputError
from jraggym.launching.checks import check_command, check_counts
from jraggym.launching.processes import LaunchError, Preempted, Report, run_together, tail_of, with_restarts


@dataclass(frozen=True)
class Local:
    """Runs the command as several processes on this machine."""

    hosts: int = 2
    """Processes."""
    devices: int | None = None
    """CPU devices that each process has; without it, the devices are those that JAX finds."""
    restarts: int = 3
    """The command is run again so many times when it ends with exit code 75, preempted."""
    backoff: float = 1.0
    """Seconds before the first restart; they double from one to the next."""


def commands(settings: Local, command: Sequence[str], port: int) -> dict[str, list[str]]:
    """The command of each process, by its number. Raises InputError."""
    check_command(command)
    check_counts(restarts=settings.restarts)
    if settings.hosts < 1:
        raise InputError("there is no process to start", got=f"--hosts {settings.hosts}", remedy="Use 1 or more.")
    if settings.devices is not None and settings.devices < 1:
        raise InputError("a process needs a device", got=f"--devices {settings.devices}", remedy="Use 1 or more.")
    start = [sys.executable if command[0] in ("python", "python3") else command[0], *command[1:]]
    shared = ["--hosts.address", f"127.0.0.1:{port}", "--hosts.number", str(settings.hosts)]
    return {str(i): [*start, *shared, "--hosts.process", str(i)] for i in range(settings.hosts)}


def environment(settings: Local) -> dict[str, str]:
    """What is added to each process's environment."""
    if settings.devices is None:
        return {}
    return {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(settings.devices)}


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run(settings: Local, command: Sequence[str], show: Report, report: Report) -> None:
    """Runs the processes to their end; one that fails ends the others.

    Raises Preempted for exit code 75 once the restarts are used up, LaunchError (with `code`) for another one, Stopped.
    """

    def start(attempt: int) -> None:
        group = commands(settings, command, free_port())
        ended = run_together(group, show, environment=environment(settings))
        if ended.code == PREEMPTED:
            raise Preempted(f"process {ended.name} was preempted (exit code {PREEMPTED})")
        if ended.code:
            what = f"process {ended.name} ended with exit code {ended.code}; the others were ended"
            raise LaunchError(f"{what}. Its last lines:\n{tail_of(ended.tail)}", ended.code)

    with_restarts(start, settings.restarts, report, backoff=settings.backoff)
