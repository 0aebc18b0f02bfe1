"""A launch on a GKE cluster with TPUs, through xpk: the cluster itself restarts what was preempted.

Source: github.com/AI-Hypercomputer/xpk, docs/usage/workloads.md and parser/workload.py, read in 2025.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from jraggym.errors import LOST, PREEMPTED, InputError
from jraggym.launching.checks import check_carried, check_counts, check_name, check_place, require
from jraggym.launching.processes import (
    CommandFailed,
    LaunchError,
    Report,
    call,
    run_together,
    tail_of,
)
from jraggym.launching.topology import Slices, parse

UNSUCCESSFUL = 125  # xpk's exit code for a workload that ended, and not well


@dataclass(frozen=True)
class Gke:
    """Runs the command as a workload of a GKE cluster that xpk made."""

    name: str
    """Name of the job and of its workload: the same name is the same job."""
    topology: str
    """Slices as in train.plan: v5e:8x8, v5p:4x4x4, v6e:16x16; 2xv5p:4x4x4 for two."""
    cluster: str = ""
    """The cluster's name."""
    image: str = ""
    """The container image with the project and jax[tpu], such as us-docker.pkg.dev/PROJECT/REPOSITORY/jraggym:1."""
    project: str = ""
    """Id of the Google Cloud project."""
    zone: str = ""
    """Zone of the cluster, such as us-east5-a."""
    do: Literal["run", "logs", "delete"] = "run"
    """run: start the workload, or go on watching it; logs: show the first worker's; delete: end and remove it."""
    restarts: int = 20
    """The cluster starts the command again so many times after preemptions."""
    grace: int = 120
    """Seconds between SIGTERM and SIGKILL, in which the command saves. Spot nodes are gone after about 30."""


def check(settings: Gke, command: Sequence[str]) -> Slices:
    """The slices of the job. Raises InputError for settings that cannot be launched."""
    check_name(settings.name)
    check_place(settings.project, settings.zone)
    check_counts(restarts=settings.restarts, grace=settings.grace)
    if not settings.cluster:
        raise InputError("no cluster", got="nothing", remedy="Add --cluster NAME: `xpk cluster list` shows them.")
    if settings.do == "run":
        check_carried(command)
        if not settings.image:
            remedy = "Add --image: build one that has the project and jax[tpu], and push it to a registry."
            raise InputError("no container image", got="nothing", remedy=remedy)
    elif command:
        raise InputError(f"--do {settings.do} takes no command", got=shlex.join(command), remedy="Leave it away.")
    return parse(settings.topology)


def create(settings: Gke, command: Sequence[str]) -> list[str]:
    """Submits the workload. `exec` lets SIGTERM reach the command and not only the shell around it."""
    slices = parse(settings.topology)
    return [
        *_workload("create", settings),
        f"--workload={settings.name}",
        f"--tpu-type={slices.accelerator_type}",
        f"--num-slices={slices.number}",
        f"--docker-image={settings.image}",
        f"--max-restarts={settings.restarts}",
        f"--restart-on-exit-codes={LOST},{PREEMPTED}",
        f"--termination-grace-period-seconds={settings.grace}",
        f"--command=exec {shlex.join(command)}",
    ]


def wait(settings: Gke) -> list[str]:
    """Waits for the workload's end: exit code 0, or 125 when it failed."""
    return [*_workload("list", settings), f"--wait-for-job-completion={settings.name}"]


def find(settings: Gke, status: str) -> list[str]:
    """Lists the workload if it is in this state: EVERYTHING, FAILED, SUCCESSFUL, RUNNING, QUEUED."""
    return [*_workload("list", settings), f"--filter-by-job=^{settings.name}$", f"--filter-by-status={status}"]


def delete(settings: Gke) -> list[str]:
    """Ends and removes the workload."""
    return [*_workload("delete", settings), f"--workload={settings.name}", "--force"]


def logs(settings: Gke) -> list[str]:
    """Follows the log of a worker of the first slice; any call of xpk before it has put the credentials in place."""
    return ["kubectl", "logs", "--follow", "--tail=200", f"job/{settings.name}-slice-job-0"]


def plan(settings: Gke, command: Sequence[str]) -> list[list[str]]:
    """All commands of a launch that nothing disturbs, in order. Raises InputError."""
    check(settings, command)
    if settings.do == "delete":
        return [delete(settings)]
    if settings.do == "logs":
        return [find(settings, "EVERYTHING"), logs(settings)]
    return [create(settings, command), wait(settings)]


def run(settings: Gke, command: Sequence[str], show: Report, report: Report) -> None:
    """Runs the workload to its end, or shows its log, or removes it, as `do` says.

    Raises InputError, LaunchError, Stopped.
    """
    check(settings, command)
    require("xpk", "Install it with `pip install xpk`; it needs gcloud and kubectl, too.")
    *before, last = plan(settings, command)
    if settings.do == "run":
        _submit(settings, command, report)
    else:
        for argv in before:
            call(argv)
    ended = run_together({settings.name: last}, show)
    if settings.do == "run" and ended.code == UNSUCCESSFUL:
        remedy = "Its log: --do logs. The same launch removes it and starts anew, from the last checkpoint."
        raise LaunchError(f"the workload failed. {remedy}\n{tail_of(ended.tail)}", ended.code)
    if ended.code:
        raise LaunchError(f"--do {settings.do}: exit code {ended.code}\n{tail_of(ended.tail)}", ended.code)


def _submit(settings: Gke, command: Sequence[str], report: Report) -> None:
    """Makes sure that one workload of this name is there: a failed one is replaced, any other one is kept."""
    try:
        try:
            call(create(settings, command))
        except CommandFailed as error:
            if "already exists" not in error.output:
                raise
            if not _is(settings, "FAILED"):
                report(f"{settings.name} is there already; nothing new is started")
                return
            report(f"{settings.name} failed before; it is removed and started anew")
            call(delete(settings))
            call(create(settings, command))
    except CommandFailed as error:
        raise LaunchError(f"the workload cannot be started: {error}") from error


def _is(settings: Gke, status: str) -> bool:
    rows = call(find(settings, status)).splitlines()
    return any(re.match(rf"{re.escape(settings.name)}\s", row) for row in rows)


def _workload(verb: str, settings: Gke) -> list[str]:
    where = [f"--cluster={settings.cluster}", f"--project={settings.project}", f"--zone={settings.zone}"]
    return ["xpk", "workload", verb, *where]
