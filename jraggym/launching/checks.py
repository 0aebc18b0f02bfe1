"""Checks of what goes into a command line, before anything is created or paid for."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence

from jraggym.errors import InputError

LONGEST = 39  # xpk's limit of a workload's name; slices of a TPU VM add `-0`, `-1` to theirs


def check_name(name: str) -> None:
    """Raises InputError unless the name is one that Google Cloud and Kubernetes both take (RFC 1035)."""
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name) or len(name) > LONGEST:
        remedy = f"Use a letter, then letters, digits and hyphens, all lower case, {LONGEST} in all."
        raise InputError("no name of a job", got=repr(name), remedy=remedy)


def check_place(project: str, zone: str) -> None:
    """Raises InputError unless both look like a project's id and a zone."""
    if not re.fullmatch(r"([a-z0-9.-]+:)?[a-z][a-z0-9-]{4,28}[a-z0-9]", project):
        remedy = "Add --project ID: `gcloud projects list` shows the ids."
        raise InputError("no project", got=repr(project), remedy=remedy)
    if not re.fullmatch(r"[a-z]+-[a-z]+\d+-[a-z]", zone):
        remedy = "Add --zone, such as us-east5-a: `gcloud compute tpus locations list` shows them."
        raise InputError("no zone", got=repr(zone), remedy=remedy)


def check_bucket(bucket: str | None) -> None:
    """Raises InputError unless it is a bucket's name, with no gs:// and no folder."""
    if bucket is not None and not re.fullmatch(r"[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]", bucket):
        remedy = "Write the name alone, as in --bucket my-bucket; folders are named in the command, as /bucket/runs/x."
        raise InputError("no bucket", got=repr(bucket), remedy=remedy)


def check_command(command: Sequence[str]) -> None:
    """Raises InputError for no command."""
    if not command:
        remedy = "Write it behind --, as in: -- python -m train.dpo synthhop --out /bucket/runs/dpo"
        raise InputError("there is no command to launch", got="nothing", remedy=remedy)


def check_carried(command: Sequence[str]) -> None:
    """Raises InputError for no command, or one with a line break, which not every launcher carries unharmed."""
    check_command(command)
    if broken := [part for part in command if "\n" in part or "\r" in part or "\0" in part]:
        remedy = "Put long values into a file and name the file."
        raise InputError("a part of the command has a line break", got=repr(broken[0]), remedy=remedy)


def check_counts(**counts: int) -> None:
    """Raises InputError for a count below 0."""
    for name, count in counts.items():
        if count < 0:
            raise InputError(f"--{name} is below zero", got=count, remedy="Use 0 or more.")


def require(tool: str, remedy: str) -> None:
    """Raises InputError when a program is not on PATH."""
    if shutil.which(tool) is None:
        raise InputError(f"{tool} is not installed, or not on PATH", got="nothing", remedy=remedy)
