"""Several processes, usually one on each machine, as one job: who they are, how they meet, and what they tell another.

    with connect(Hosts("10.0.0.2:8475", number=4, process=1)):
        ...                                  # before anything else touches a device

Every process runs the same program on the same data; each reads, retrieves for and computes its own rows. What
has to be known of all records before (which of them give a row), each finds out for its own share of them.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import signal
import socket
import sys
import traceback
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jraggym.clock import spent
from jraggym.errors import LOST, InputError
from jraggym.roll_call import Hub, Member, endpoint

PORT = 8475  # on a slice, where nobody names one
_HINT = "start the same command on every machine, each with its own --hosts.process, and the same --hosts.address."
_SLICE = "this is one worker of a TPU slice, and the same command must run on all of them (ssh --worker=all)."


@dataclass(frozen=True)
class Hosts:
    """The processes of a job. By default a TPU slice's environment says who they are, and elsewhere there is one."""

    address: str | None = None
    """HOST:PORT of process 0, that all others can reach."""
    number: int | None = None
    """How many processes there are."""
    process: int | None = None
    """Which one this is, from 0."""
    timeout: float = 45.0
    """Seconds to wait for the others at the start, and for a sign of life later."""

    def __post_init__(self) -> None:
        given = [self.address is not None, self.number is not None, self.process is not None]
        if any(given) and not all(given) and not (self.number == 1 and self.address is None):
            got = f"address={self.address}, number={self.number}, process={self.process}"
            raise InputError("several hosts need all three of these", got=got, remedy="Give all or none.")
        if self.number is not None and not 0 <= (self.process or 0) < self.number:
            got, remedy = f"process {self.process} of {self.number}", "Count the processes from 0."
            raise InputError("there is no such process", got=got, remedy=remedy)
        if self.timeout <= 0:
            raise InputError("a timeout must be positive", got=self.timeout, remedy="Give seconds.")
        if self.address is not None:
            endpoint(self.address)


@contextmanager
def connect(hosts: Hosts, environment: Mapping[str, str] = os.environ) -> Iterator[None]:
    """Joins the other processes for the time of the block; a single process does nothing.

    It must come before anything touches a device. A process that never arrives, dies, falls silent or fails ends all
    others within `timeout` seconds, with one sentence on stderr and exit code `LOST`; of those that go on without a
    word of their own, only process 0 prints to stdout.

    Raises:
        InputError: the address is wrong.
    """
    found, hint = (hosts, _HINT) if hosts.number else (slice_hosts(environment), _SLICE)
    if found is None or found.number == 1:
        yield
        return
    member = _meet(replace(found, timeout=hosts.timeout), hint)
    try:
        yield
    except BaseException as error:
        code = _code(error)
        if not member.leave(code, "" if isinstance(error, SystemExit) else f"{type(error).__name__}: {error}"[:500]):
            if isinstance(error, InputError):
                sys.stderr.write(f"error: {error}\n")
            elif not isinstance(error, SystemExit):
                traceback.print_exc()
            _exit(code)  # at a usual end jax would wait for the others
        raise
    member.leave()


def _code(error: BaseException) -> int:
    """The exit code that an exception ends a process with."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return 2 if isinstance(error, InputError) else 1


def lead() -> bool:
    """Is this the process that prints and writes for all (process 0, or the only one)?"""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def share(value: Any) -> list[Any]:
    """The `value` that each process gives here, in the order of the processes; all must come, so it is a barrier.

    Values are pickled: like every collective, this trusts the other processes of the job.
    """
    if not jax.distributed.is_initialized():
        return [value]
    data = pickle.dumps(value)
    with spent("hosts"):
        sizes = multihost_utils.process_allgather(np.int64(len(data)))
        width = 1 << max(10, int(sizes.max() - 1).bit_length())  # a program is compiled for each width
        padded = np.zeros(width, np.uint8)
        padded[: len(data)] = np.frombuffer(data, np.uint8)
        rows = multihost_utils.process_allgather(padded)
    return [pickle.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def agreed(value: Any) -> Any:
    """What process 0 says, for what the others might see differently (a file that it is just writing)."""
    return share(value if lead() else None)[0]


def lead_first(make: Callable[[], Any]) -> Any:
    """What `make` gives: process 0 goes first, and may leave files in which the others find its work done."""
    found = make() if lead() else None
    share(None)
    return found if lead() else make()


def joined(own: Mapping[int, Any]) -> dict[int, Any]:
    """The numbered results of all processes, each of which had some of the work."""
    return {number: one for part in share(dict(own)) for number, one in part.items()}


def surveyed(count: int, look: Callable[[int], Any]) -> list[Any]:
    """What `look` gives for each of `count` items, in their order; every process looks at its own share alone."""
    several = jax.distributed.is_initialized()
    number, me = (jax.process_count(), jax.process_index()) if several else (1, 0)
    own = range(count * me // number, count * (me + 1) // number)
    return [one for part in share([look(i) for i in own]) for one in part]


def fetch(tree: Any) -> Any:
    """The tree with each array that is spread over several processes as a whole one of numpy; all must ask."""

    def whole(leaf: Any) -> Any:
        spread = isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
        return multihost_utils.process_allgather(leaf, tiled=True) if spread else leaf

    return jax.tree.map(whole, tree)


# ---------------------------------------------------------------- the environment of a slice


def slice_hosts(environment: Mapping[str, str], metadata: Callable[[str], str] | None = None) -> Hosts | None:
    """What a TPU slice says of its workers: in TPU_WORKER_HOSTNAMES (GKE) or its metadata (Cloud TPU VMs).

    None for a single worker, and where there is no slice. Of several slices (MEGASCALE_*) all workers are one job.
    """
    names, worker = environment.get("TPU_WORKER_HOSTNAMES", ""), environment.get("TPU_WORKER_ID", "0")
    if not names and (metadata is not None or _has_tpu(environment)):
        read = metadata or _metadata
        lines = (line.partition(":") for line in read("tpu-env").splitlines())  # where several slices say so
        environment = {**{key.strip(): value.strip().strip("'") for key, _, value in lines}, **environment}
        parts = [endpoint.split(":") for endpoint in read("worker-network-endpoints").split(",")]
        names, worker = ",".join(part[2] if len(part) == 3 else part[0] for part in parts), read("agent-worker-number")
    each = [name.strip() for name in names.split(",") if name.strip()]
    number = len(each) * int(environment.get("MEGASCALE_NUM_SLICES") or 1)
    if number < 2:
        return None
    first = environment.get("MEGASCALE_COORDINATOR_ADDRESS", "").split(":")[0] or each[0]
    process = int(environment.get("MEGASCALE_SLICE_ID") or 0) * len(each) + int(worker)
    return Hosts(f"{first}:{PORT}", number, process)


def _has_tpu(environment: Mapping[str, str]) -> bool:
    # accel of v4, vfio of later ones; where PCI shows no TPU, jax itself sets the variable.
    nodes = [*Path("/dev").glob("accel[0-9]*"), *Path("/dev/vfio").glob("[0-9]*")]
    return "TPU_SKIP_MDS_QUERY" not in environment and bool(nodes)


def _metadata(key: str) -> str:
    """An attribute of this virtual machine; empty where there is none."""
    host = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
    url = f"http://{host}/computeMetadata/v1/instance/attributes/{key}"
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, headers={"Metadata-Flavor": "Google"}), timeout=5
        ) as at:
            return at.read().decode()
    except OSError:
        return ""


# ---------------------------------------------------------------- meeting


def _meet(hosts: Hosts, hint: str) -> Member:
    """Waits for all processes and starts jax's own service among them."""
    address, number, process = hosts.address or "", hosts.number or 0, hosts.process or 0
    if process == 0:
        host, _, _ = address.rpartition(":")
        Hub(address, number, hosts.timeout, f"{host}:{_free_port()}", hint).start()
    member = Member(process, number, _lost)
    meet = member.arrive(address, hosts.timeout, hint)
    _patient_abort()
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # The roll call is quicker and says more: jax's own limits are out of its way.
    limits: dict[str, Any] = {
        "initialization_timeout": 300,
        "heartbeat_timeout_seconds": 600,
        "shutdown_timeout_seconds": 10,
    }
    jax.distributed.initialize(meet, number, process, **limits)
    if process:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return member


def _free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def _patient_abort() -> None:
    """Lets a thread that aborts wait some seconds, in which the roll call says why and ends the process.

    jax aborts the others at once when process 0 dies, from a thread that knows no Python. The handler is libc's own
    `sleep`; its argument, the number of the signal, is its six seconds.
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))


def _lost(sentence: str) -> None:
    sys.stderr.write(f"error: {sentence}\n")
    _exit(LOST)


def _exit(code: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)
