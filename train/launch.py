"""Bringing a training command to machines: python -m train.launch TARGET [settings] -- COMMAND

    python -m train.launch local --hosts 2 --devices 4 -- python -m train.dpo synthhop --out runs/dpo
    python -m train.launch tpu-vm --name dpo-8b --topology v5p:4x4x4 --project my-project --zone us-east5-a \\
        --capacity spot --bucket my-bucket -- python -m train.dpo synthhop --out /bucket/runs/dpo
    python -m train.launch gke --name dpo-8b --topology 2xv5p:4x4x4 --cluster my-cluster --project my-project \\
        --zone us-east5-a --image IMAGE -- python -m train.dpo synthhop --out /bucket/runs/dpo

The same launch, given again, goes on where it was: it waits for the same slice and watches the same run. A command that
ends with exit code 75 was preempted and is run again. --dry-run prints the commands and runs none.

Exit codes: 0 done, 2 bad input, 75 stopped or preempted too often (give the same launch again), else the command's own.
"""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from typing import Annotated

import tyro

from jraggym.errors import PREEMPTED, exit_on_input_error
from jraggym.launching import gke, local, pod, tpu_vm
from jraggym.launching.gke import Gke
from jraggym.launching.local import Local
from jraggym.launching.processes import LaunchError
from jraggym.launching.tpu_vm import TpuVm

Target = Local | TpuVm | Gke


@dataclass(frozen=True)
class Job:
    """Where the command is to run."""

    target: (
        Annotated[Local, tyro.conf.subcommand("local")]
        | Annotated[TpuVm, tyro.conf.subcommand("tpu-vm")]
        | Annotated[Gke, tyro.conf.subcommand("gke")]
    )
    dry_run: bool = False
    """Print the commands of a launch that nothing disturbs, and run none."""


def main() -> None:
    ours, command = split(sys.argv[1:])
    config = (tyro.conf.CascadeSubcommandArgs, tyro.conf.OmitSubcommandPrefixes, tyro.conf.OmitArgPrefixes)
    with exit_on_input_error():
        job = tyro.cli(Job, args=ours, description=__doc__, config=config)
        if job.dry_run:
            for line in planned(job.target, command):
                print(shlex.join(line))
            return
        try:
            run(job.target, command)
        except LaunchError as error:
            report(f"error: {error}")
            raise SystemExit(error.code) from error
        except KeyboardInterrupt as error:  # while it waits in a queue
            report("stopped; the same launch goes on from here")
            raise SystemExit(PREEMPTED) from error


def split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """What is ours, and the command behind the first `--`."""
    at = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:at], arguments[at + 1 :]


def run(target: Target, command: list[str]) -> None:
    """Runs a launch to its end."""
    if isinstance(target, Local):
        local.run(target, command, show, report)
    elif isinstance(target, TpuVm):
        pod.run(target, command, show, report)
    else:
        gke.run(target, command, show, report)


def planned(target: Target, command: list[str]) -> list[list[str]]:
    """The command lines of a launch that nothing disturbs."""
    if isinstance(target, Local):
        added = [f"{name}={value}" for name, value in local.environment(target).items()]
        return [["env", *added, *argv] for argv in local.commands(target, command, port=local.free_port()).values()]
    return tpu_vm.plan(target, command) if isinstance(target, TpuVm) else gke.plan(target, command)


def show(line: str) -> None:
    print(line, flush=True)


def report(line: str) -> None:
    print(f"launch: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
