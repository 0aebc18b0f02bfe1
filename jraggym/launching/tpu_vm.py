"""Command lines of gcloud for Cloud TPU VMs: one queued resource of one or more slices, named like the job.

Source: the reference of `gcloud compute tpus` (queued-resources, tpu-vm), read in 2025.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jraggym.errors import InputError
from jraggym.launching.checks import check_bucket, check_carried, check_counts, check_name, check_place
from jraggym.launching.topology import Slices, parse

ROOT = Path(__file__).resolve().parents[2]  # the checkout that is launched
PACKED = ("pyproject.toml", "README.md", "LICENSE", "jraggym", "train", "eval", "configs")


@dataclass(frozen=True)
class TpuVm:
    """Runs the command on all workers of a Cloud TPU slice, or of several."""

    name: str
    """Name of the job and of its queued resource: the same name is the same job."""
    topology: str
    """A slice as in train.plan: v5e:8x8, v5p:4x4x4, v6e:16x16; 2xv5p:4x4x4 for two slices."""
    project: str = ""
    """Id of the Google Cloud project."""
    zone: str = ""
    """Zone of the slice, such as us-east5-a."""
    bucket: str | None = None
    """A bucket's name, mounted as /bucket on all workers: checkpoints must outlive the machines."""
    capacity: Literal["on-demand", "spot", "reserved"] = "on-demand"
    """Spot slices cost less and can be taken away at any moment."""
    do: Literal["run", "logs", "delete"] = "run"
    """run: get the slice, install, run, or go on watching what runs; logs: show worker 0's; delete: give it back."""
    delete_after: bool = False
    """Give the slice back once the command has ended well. Otherwise it is held, and paid for, until --do delete."""
    restarts: int = 20
    """The command is run again so many times after preemptions."""
    wait_hours: float = 48.0
    """Longest wait for a slice; the request stays in Google's queue after that."""
    poll: float = 30.0
    """Seconds between two looks at a queue."""
    backoff: float = 10.0
    """Seconds before the first restart; they double from one to the next."""
    runtime: str | None = None
    """Image of the TPU VMs; without it, the one that belongs to the TPU."""
    network: str | None = None
    subnetwork: str | None = None
    service_account: str | None = None
    """Its e-mail address; it must be allowed to write to the bucket."""


def check(settings: TpuVm, command: Sequence[str]) -> Slices:
    """The slices of the job. Raises InputError for settings that cannot be launched."""
    check_name(settings.name)
    check_place(settings.project, settings.zone)
    check_bucket(settings.bucket)
    check_counts(restarts=settings.restarts)
    if settings.do == "run":
        check_carried(command)
    elif command:
        raise InputError(f"--do {settings.do} takes no command", got=shlex.join(command), remedy="Leave it away.")
    return parse(settings.topology)


def create(settings: TpuVm) -> list[str]:
    """Asks for the slices."""
    slices = parse(settings.topology)
    several = [f"--node-count={slices.number}", f"--node-prefix={settings.name}"]
    optional = {
        "network": settings.network,
        "subnetwork": settings.subnetwork,
        "service-account": settings.service_account,
    }
    return [
        *_queued("create", settings),
        f"--accelerator-type={slices.accelerator_type}",
        f"--runtime-version={settings.runtime or slices.runtime}",
        *(several if slices.number > 1 else [f"--node-id={settings.name}"]),
        "--scopes=https://www.googleapis.com/auth/cloud-platform",
        *([] if settings.capacity == "on-demand" else [f"--{settings.capacity}"]),
        *(f"--{flag}={value}" for flag, value in optional.items() if value is not None),
        "--quiet",
    ]


def describe(settings: TpuVm) -> list[str]:
    """Asks for the state of the request, as JSON."""
    return [*_queued("describe", settings), "--format=json"]


def delete(settings: TpuVm) -> list[str]:
    """Gives the slices back and removes the request, in whatever state both are."""
    return [*_queued("delete", settings), "--force", "--quiet"]


def nodes(settings: TpuVm) -> list[str]:
    """The slices' own names."""
    number = parse(settings.topology).number
    return [f"{settings.name}-{i}" for i in range(number)] if number > 1 else [settings.name]


def node_state(settings: TpuVm, node: str) -> list[str]:
    """Asks for the state of one slice, such as READY."""
    return [*_node("describe", settings, node), "--format=value(state)"]


def pack(archive: str) -> list[str]:
    """Packs the project's code. Raises InputError when this is no checkout."""
    if missing := [name for name in PACKED if not (ROOT / name).exists()]:
        remedy = "Launch from a checkout of the project, installed with `pip install -e .`."
        raise InputError("the project's code is not here", got=f"no {missing[0]} in {ROOT}", remedy=remedy)
    return ["tar", "-czf", archive, "--exclude=__pycache__", "-C", str(ROOT), *PACKED]


def upload(settings: TpuVm, node: str, archive: str) -> list[str]:
    """Copies the packed project to all workers of a slice."""
    copy = ["gcloud", "compute", "tpus", "tpu-vm", "scp", archive, f"{node}:{folder(settings)}.tar.gz"]
    return [*copy, *_place(settings), "--worker=all", "--quiet"]


def remote(settings: TpuVm, node: str, line: str, worker: str = "all") -> list[str]:
    """Runs a shell line on workers of a slice, in their home folder."""
    return [*_node("ssh", settings, node), f"--worker={worker}", f"--command={line}", "--quiet"]


def folder(settings: TpuVm) -> str:
    """The project's folder on a worker, below the home folder."""
    return f"jraggym-{settings.name}"


def install_line(settings: TpuVm) -> str:
    """Unpacks and installs the project; where the job's command still runs, all stays as it is."""
    there = folder(settings)
    unpack = shlex.join(["tar", "-xzf", f"{there}.tar.gz", "-C", there])
    setup = shlex.join(["bash", f"{there}/jraggym/launching/setup.sh", there, *filter(None, [settings.bucket])])
    locked = shlex.join(["flock", "-n", "-E", "0", f"{there}/run/lock", "sh", "-c", f"{unpack} && exec {setup}"])
    # One install after the other: where a connection broke, the next one waits for what still runs.
    alone = shlex.join(["flock", f"{there}/run/install", "sh", "-c", locked])
    return f"{shlex.join(['mkdir', '-p', f'{there}/run'])} && {alone}"


def worker_line(settings: TpuVm, command: Sequence[str], attempt: str | None = None, replace: bool = False) -> str:
    """Starts the command, unless it runs, and shows its log (see worker.py)."""
    start = [".venv/bin/python", "-m", "jraggym.launching.worker", "--folder", "run"]
    named = [] if attempt is None else ["--attempt", attempt]
    parts = [*start, *named, *(["--replace"] if replace else []), *(["--", *command] if command else [])]
    return f"{shlex.join(['cd', folder(settings)])} && exec {shlex.join(parts)}"


def plan(settings: TpuVm, command: Sequence[str]) -> list[list[str]]:
    """All commands of a launch that nothing disturbs, in order. Raises InputError."""
    check(settings, command)
    if settings.do == "delete":
        return [delete(settings)]
    if settings.do == "logs":
        return [remote(settings, nodes(settings)[0], worker_line(settings, ()), worker="0")]
    lines = [install_line(settings), worker_line(settings, command, attempt="ATTEMPT")]
    return [
        create(settings),
        describe(settings),
        *(node_state(settings, node) for node in nodes(settings)),
        pack("project.tar.gz"),
        *(upload(settings, node, "project.tar.gz") for node in nodes(settings)),
        *(remote(settings, node, line) for line in lines for node in nodes(settings)),
        *([delete(settings)] if settings.delete_after else []),
    ]


def _queued(verb: str, settings: TpuVm) -> list[str]:
    return ["gcloud", "compute", "tpus", "queued-resources", verb, settings.name, *_place(settings)]


def _node(verb: str, settings: TpuVm, node: str) -> list[str]:
    return ["gcloud", "compute", "tpus", "tpu-vm", verb, node, *_place(settings)]


def _place(settings: TpuVm) -> list[str]:
    return [f"--project={settings.project}", f"--zone={settings.zone}"]
