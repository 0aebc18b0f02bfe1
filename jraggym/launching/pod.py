"""A launch on Cloud TPU VMs: get the slices, install, run, start again after a preemption, give them back.

Every step asks what is there before it does anything, so a launch that was ended can be given again at any point.
"""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import tenacity

from jraggym.errors import LOST, PREEMPTED, InputError
from jraggym.launching import tpu_vm
from jraggym.launching.checks import require
from jraggym.launching.processes import (
    CommandFailed,
    LaunchError,
    Preempted,
    Report,
    Stopped,
    call,
    run_together,
    tail_of,
    with_restarts,
)
from jraggym.launching.tpu_vm import TpuVm

BROKEN = 255  # ssh's exit code for a broken connection
OF_A_WORKER = re.compile(r"execution on worker \d+ failed with exit status (\d+)")  # gcloud's line for each of several
CONNECTIONS = 6  # attempts to connect before a healthy slice counts as unreachable
GRACE = 90.0  # seconds that the other slices have to notice that one failed: they then end by themselves

WAITING = ("CREATING", "ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "SUSPENDING", "DELETING")
COMING = ("CREATING", "STARTING", "RESTARTING", "REPAIRING")  # states of a slice that will be READY

REMEDIES = {  # what a message of gcloud says: what to do
    "PERMISSION_DENIED": "Ask for the role TPU Admin in this project, and enable the Cloud TPU API.",
    "uota": "Ask for more quota of this TPU in this zone, or take a smaller --topology or another --capacity.",
    "could not be found in the zonal": "This zone has no such TPU: choose another --zone or --topology.",
    "UNAUTHENTICATED": "Run `gcloud auth login`.",
    "auth login": "Run `gcloud auth login`.",
    "ssh-add": "Run `ssh-add ~/.ssh/google_compute_engine`: gcloud needs the key in an agent for several workers.",
}


class ConnectionLost(LaunchError):
    """The connection broke; the slices are as they were."""


def run(settings: TpuVm, command: Sequence[str], show: Report, report: Report) -> None:
    """Runs the command on all workers to its end, or shows the log, or gives the slices back, as `do` says.

    Raises InputError, LaunchError, Preempted once the restarts are used up, Stopped.
    """
    tpu_vm.check(settings, command)
    require("gcloud", "Install the Google Cloud CLI: https://cloud.google.com/sdk/docs/install")
    pod = Pod(settings, show, report)
    if settings.do == "delete":
        pod.delete()
    elif settings.do == "logs":
        ended = run_together({"0": tpu_vm.plan(settings, command)[0]}, show)
        if ended.code:
            raise LaunchError(f"no log could be shown:\n{tail_of(ended.tail)}", ended.code)
    else:
        try:
            with_restarts(lambda n: pod.attempt(command, n), settings.restarts, report, backoff=settings.backoff)
        except Stopped as error:
            goes_on = "What runs on the slices goes on: the same launch shows it again, --do delete ends it"
            raise Stopped(f"{error}. {goes_on}") from error
        if settings.delete_after:
            pod.delete()
        else:
            report(f"done. The slice is held, and paid for, until: --do delete (name {settings.name})")


class Pod:
    """The queued resource of one job, and its slices."""

    def __init__(self, settings: TpuVm, show: Report, report: Report):
        self.settings, self.show, self.report = settings, show, report
        self.asked = False  # whether the request in the queue is of this launch
        self.told = ""

    def attempt(self, command: Sequence[str], number: int) -> None:
        """From whatever is there to the command's end. Raises Preempted, LaunchError, Stopped."""
        nodes = self.acquire()
        settings = self.settings
        with tempfile.TemporaryDirectory() as there:
            archive = str(Path(there) / "project.tar.gz")
            call(tpu_vm.pack(archive))
            self.report(f"install on {', '.join(nodes)}")
            self._on_all(nodes, lambda node: tpu_vm.upload(settings, node, archive))
        self._on_all(nodes, lambda node: tpu_vm.remote(settings, node, tpu_vm.install_line(settings)))
        # One name for all workers and all connections of this attempt: a second connection finds the first one's run.
        name = datetime.now(UTC).strftime("%Y%m%d-%H%M%S-%f")
        self.report(f"run on all workers of {', '.join(nodes)} (attempt {name})")
        line = tpu_vm.worker_line(settings, command, attempt=name, replace=number > 0)
        self._on_all(nodes, lambda node: tpu_vm.remote(settings, node, line))

    def acquire(self) -> list[str]:
        """Waits until all slices are ready and gives their names; asks for them where nobody did.

        Raises LaunchError when Google refuses, or --wait-hours are over.
        """
        self.asked = False
        hours = self.settings.wait_hours
        waiting = tenacity.Retrying(
            retry=tenacity.retry_if_result(lambda nodes: nodes is None),
            wait=tenacity.wait_fixed(self.settings.poll),
            stop=tenacity.stop_after_delay(hours * 3600),
        )
        try:
            nodes = waiting(self._approach)
        except tenacity.RetryError as error:
            what = f"no slice after {hours:g} h; the request stays in the queue"
            remedy = "The same launch goes on waiting; --do delete takes the request back."
            raise LaunchError(f"{what} ({self.told}). {remedy}", PREEMPTED) from error
        assert nodes is not None
        return nodes

    def delete(self) -> None:
        """Gives the slices back and removes the request; it is fine when there is none."""
        self._tell("give the slices back")
        try:
            call(tpu_vm.delete(self.settings))
        except CommandFailed as error:
            if "NOT_FOUND" not in error.output:
                raise refused("the slices cannot be given back; they may still be paid for", error) from error
        self.asked = False

    def _approach(self) -> list[str] | None:
        """One step towards slices that are ready: their names once they are."""
        request = self._request()
        state = _state(request)
        self._tell(f"{self.settings.name}: {state}")
        if request is None:
            self._create()
        elif state == "ACTIVE":
            nodes = _nodes(request) or tpu_vm.nodes(self.settings)
            states = self._node_states(nodes)
            if all(one == "READY" for one in states):
                return nodes
            if any(one not in ("READY", *COMING) for one in states):  # taken away, and the request not yet told
                self.delete()
        elif state == "FAILED" and self.asked:
            message = json.dumps(request["state"].get("failedData", {}))
            raise LaunchError(f"Google refused the slices: {message}. {remedy_for(message)}")
        elif state in ("FAILED", "SUSPENDED"):  # it never becomes active again, and keeps its share of the quota
            self.delete()
        elif state not in WAITING:
            raise LaunchError(f"the queued resource is in a state that this version does not know: {state}")
        return None

    def _create(self) -> None:
        try:
            call(tpu_vm.create(self.settings))
        except CommandFailed as error:
            if "ALREADY_EXISTS" not in error.output:
                raise refused("the slices cannot be asked for", error) from error
        self.asked = True

    def _request(self) -> dict[str, Any] | None:
        """What Google knows of the queued resource; None when there is none."""
        try:
            request: dict[str, Any] = json.loads(call(tpu_vm.describe(self.settings)))
        except CommandFailed as error:
            if "NOT_FOUND" in error.output:
                return None
            raise refused("the queue cannot be read", error) from error
        except json.JSONDecodeError as error:
            raise LaunchError(f"gcloud describes the request in no JSON: {error}") from error
        self._refuse_other_slices(request)
        return request

    def _refuse_other_slices(self, request: dict[str, Any]) -> None:
        """Raises InputError when the request of this name is for other slices than ours."""
        ours, theirs = tpu_vm.parse(self.settings.topology), request.get("tpu", {}).get("nodeSpec", [])
        types = {node.get("node", {}).get("acceleratorType", ours.accelerator_type) for node in theirs}
        number = len(_nodes(request)) or ours.number
        if types - {ours.accelerator_type} or number != ours.number:
            remedy = "Choose another --name, or give the other job's slices back with --do delete."
            what = f"{self.settings.name} is not {ours.number} x {ours.accelerator_type}"
            raise InputError(what, got=f"{number} x {', '.join(sorted(types))}", remedy=remedy)

    def _node_states(self, nodes: Sequence[str]) -> list[str]:
        """The state of each slice; `GONE` for one that Google does not know."""

        def state(node: str) -> str:
            try:
                return call(tpu_vm.node_state(self.settings, node)).strip()
            except CommandFailed as error:
                if "NOT_FOUND" in error.output:
                    return "GONE"
                raise refused("the slices cannot be looked at", error) from error

        return [state(node) for node in nodes]

    def _on_all(self, nodes: Sequence[str], argv: Callable[[str], list[str]]) -> None:
        """Runs one command for each slice side by side; a broken connection is made again.

        Raises Preempted, LaunchError, Stopped.
        """
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(ConnectionLost),
            stop=tenacity.stop_after_attempt(CONNECTIONS),
            wait=tenacity.wait_exponential(self.settings.poll / 4, 120),
            before_sleep=lambda state: self.report("the connection broke; it is made again, the command goes on"),
            reraise=True,
        )
        retrying(self._on_all_once, nodes, argv)

    def _on_all_once(self, nodes: Sequence[str], argv: Callable[[str], list[str]]) -> None:
        codes: set[int] = set()  # gcloud itself ends with the code of the first worker that failed, by number

        def show(line: str) -> None:
            codes.update(map(int, OF_A_WORKER.findall(line)))
            self.show(line)

        ended = run_together({node: argv(node) for node in nodes}, show, grace=GRACE)
        if not ended.code:
            return
        own = (codes or {ended.code}) - {PREEMPTED, LOST, BROKEN}  # failures of a worker's own
        what = f"{ended.name}: exit code {min(own, default=ended.code)}"
        if not own and PREEMPTED in codes | {ended.code}:
            raise Preempted(f"{what}, preempted")
        request = self._request()
        if request is None or _state(request) == "DELETING":
            raise LaunchError(f"{what}; somebody gave the slices back", ended.code)
        if _state(request) != "ACTIVE" or {*self._node_states(nodes)} != {"READY"}:
            raise Preempted(f"{what}; the slices were taken away")
        if not own and LOST in codes | {ended.code}:
            raise Preempted(f"{what}; a worker is gone")
        if not own:
            raise ConnectionLost(f"{ended.name} cannot be reached, though it is ready:\n{tail_of(ended.tail)}")
        last = f"{tail_of(ended.tail)}\n{remedy_for(tail_of(ended.tail))}".rstrip()
        raise LaunchError(f"{what}. The slices are still held. The last lines:\n{last}", min(own))

    def _tell(self, what: str) -> None:
        """Reports a change, and no repetition."""
        if what != self.told:
            self.report(f"{what} ({time.strftime('%H:%M:%S')})")
        self.told = what


def refused(what: str, error: CommandFailed) -> LaunchError:
    """What gcloud refused, in its own words, and what to do."""
    return LaunchError(f"{what}: {error} \n{remedy_for(error.output)}".rstrip())


def remedy_for(message: str) -> str:
    """What to do about a message of gcloud; nothing for an unknown one."""
    return next((remedy for sign, remedy in REMEDIES.items() if sign in message), "")


def _state(request: dict[str, Any] | None) -> str:
    return "not asked for" if request is None else str(request.get("state", {}).get("state", "unknown"))


def _nodes(request: dict[str, Any]) -> list[str]:
    """The names of the slices as Google lists them, where it does."""
    found = [node.get("nodeId") for node in request.get("tpu", {}).get("nodeSpec", [])]
    return found if all(found) else []
