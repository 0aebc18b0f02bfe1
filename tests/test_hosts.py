"""Several processes as one job: real ones on loopback compute what one computes, and end together when one is lost."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from host_jobs import MESHES, improve, prefer, preference_rows, search_sharded, stored, stored_records

from jraggym.data.process import batches
from jraggym.errors import LOST, InputError
from jraggym.hosts import Hosts, agreed, connect, fetch, joined, lead, lead_first, share, slice_hosts
from jraggym.roll_call import Hub, Member, endpoint
from jraggym.sharding import batch_sharding, make_mesh, own_rows, place_rows, split_over
from jraggym.text.batching import Batches, Bucket, collate

TESTS = Path(__file__).parent
LIMIT = 400  # seconds until a test gives up on its processes


def free_address():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


def begin(job, folder, hosts, **environment):
    """A process of a job."""
    two_chips = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
    path = os.pathsep.join((str(TESTS.parent), str(TESTS)))
    return subprocess.Popen(
        [sys.executable, TESTS / "host_process.py", job, folder, json.dumps(hosts)],
        env={**os.environ, **two_chips, "PYTHONPATH": path, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(job, folder, number, *, starting=None, timeout=45.0, **environment):
    """The processes `starting` of a job of `number`, by default all: (exit code, stdout, stderr) of each."""
    address, folder = free_address(), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    hosts = {"address": address, "number": number, "timeout": timeout}
    each = range(number) if starting is None else starting
    return ends([begin(job, folder, {**hosts, "process": i}, **environment) for i in each])


def ends(processes):
    found = []
    try:
        for process in processes:
            out, error = process.communicate(timeout=LIMIT)
            found.append((process.returncode, out, error))
    finally:
        for process in processes:
            with suppress(ProcessLookupError):
                process.kill()
            process.wait()
    return found


def sentence(error):
    """The last words of a process."""
    said = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(said) == 1, error
    return said[0]


# ---------------------------------------------------------------- the same numbers


def same(ours, theirs, atol=1e-5):
    assert ours.keys() == theirs.keys()
    for name in ours.keys() - {"work"}:
        np.testing.assert_allclose(theirs[name], ours[name], atol=atol, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("number", [2, 4])
def test_several_hosts_compute_what_one_computes(tmp_path, number):
    mesh = make_mesh(*MESHES[2 * number])
    whole = prefer(mesh, tmp_path / "one")
    stored_records(tmp_path / "several")
    shutil.copytree(tmp_path / "one" / "2", tmp_path / "several" / "resumed" / "2")
    codes = [(code, error) for code, _, error in run("equal", tmp_path / "several", number)]
    assert [code for code, _ in codes] == [0] * number, codes
    found = {path.stem: dict(np.load(path)) for path in (tmp_path / "several").glob("*.npz")}

    same(whole, found["whole"])
    same(whole, found["resumed"])  # from one host to several; a resumed run tells its first steps again
    shutil.copytree(tmp_path / "several" / "whole" / "2", tmp_path / "back" / "2")
    same(whole, prefer(mesh, tmp_path / "back"))  # and from several to one

    np.testing.assert_array_equal(found["search"]["found"], search_sharded(mesh)[1])
    if number == 2:
        policy = improve(mesh)
        same(policy, found["policy"])
        ours, theirs = policy["work"], found["policy"]["work"]
        assert (theirs.sum(axis=0) == ours[0]).all(), "each search and each label is made once, on one host"
        assert (theirs > 0).all(), "every host retrieves for its own episodes"
        trained = stored(mesh, tmp_path / "several", tmp_path / "one")
        same(trained, found["stored"])
        surveyed, read = (found["stored"]["work"][:, i] for i in range(2))
        assert surveyed.any(axis=0).all()
        assert (surveyed.sum(axis=1) <= 30 / 2 + 3).all(), "shares of the rows begin at other records than of the whole"
        assert (read.sum(axis=1) <= 2 * 8 / 2).all(), "two steps of eight rows, half of them on each host"


def test_what_processes_tell_one_another(tmp_path):
    (first, out, _), (second, silent, _) = run("talk", tmp_path, 2)
    assert (first, second) == (0, 0)
    assert json.loads((tmp_path / "talk.json").read_text()) == {
        "share": [{"process": 0, "text": ""}, {"process": 1, "text": "x" * 3_000}],
        "agreed": "said by 0",
        "joined": {"0": "a", "10": "b", "1": "a", "11": "b"},
        "fetch": [0, 1, 2, 3],
        "lead": True,
    }
    assert "process 0 prints" in out
    assert silent == ""


def test_a_single_process_has_nobody_to_ask():
    with connect(Hosts(), environment={}), connect(Hosts(number=1)):
        assert lead()
        assert (share("a"), agreed("a"), joined({3: "a"}), lead_first(lambda: "a")) == (["a"], "a", {3: "a"}, "a")
        assert fetch({"a": 1}) == {"a": 1}


# ---------------------------------------------------------------- rows of a process


@pytest.mark.parametrize("shape", [(4, 1, 2), (2, 2, 2), (1, 1, 8)])
def test_rows_of_one_process_are_placed(shape):
    where, rows = batch_sharding(make_mesh(*shape)), np.arange(24).reshape(8, 3)
    assert own_rows(where, 8).tolist() == list(range(8))
    placed = place_rows({"a": rows}, where, 8)["a"]
    np.testing.assert_array_equal(placed, rows)
    assert placed.sharding == where
    assert split_over(where.mesh, 5) % (shape[0] * shape[1]) == 0


def test_rows_that_cannot_be_split_are_refused():
    with pytest.raises(InputError, match="7 rows, 4 parts"):
        own_rows(batch_sharding(make_mesh(4)), 7)


# ---------------------------------------------------------------- a process that is lost


@pytest.mark.parametrize(("dying", "killed"), [(1, "process 1 of 2 has died"), (0, "process 0 of 2 has died")])
def test_a_killed_process_ends_the_others(tmp_path, dying, killed):
    found = run("die", tmp_path, 2, DYING=str(dying), BY="SIGKILL")
    assert found[dying][0] == -signal.SIGKILL
    code, _, error = found[1 - dying]
    assert code == LOST
    assert killed in sentence(error)
    assert "start all again" in sentence(error)


def test_a_silent_process_ends_the_others(tmp_path):
    address = free_address()
    hosts = {"address": address, "number": 2, "timeout": 4.0}
    processes = [begin("die", tmp_path, {**hosts, "process": i}, DYING="1", BY="SIGSTOP") for i in range(2)]
    code, _, error = ends(processes[:1])[0]
    processes[1].kill()
    ends(processes[1:])
    assert code == LOST
    assert "process 1 of 2 has given no sign of life for 4 s" in sentence(error)


@pytest.mark.parametrize(
    ("starting", "said"),
    [
        ((0, 2), "processes 1, 3 of 4 did not arrive at"),
        ((3,), "process 0 of 4 did not answer at"),
    ],
)
def test_a_process_that_never_arrives_ends_the_others(tmp_path, starting, said):
    for code, _, error in run("talk", tmp_path, 4, starting=starting, timeout=3.0):
        assert code == LOST
        assert said in sentence(error)
        assert "start the same command on every machine" in sentence(error)


def test_a_failure_is_told_to_the_others(tmp_path):
    (first, _, error), (second, _, own) = run("fail", tmp_path, 2, DYING="1")
    assert (first, second) == (LOST, 2)
    assert sentence(own) == "error: no room; got 0 bytes. Make some."
    assert sentence(error).endswith("has ended with exit code 2: InputError: no room; got 0 bytes. Make some.")


def test_a_fault_that_all_find_is_their_own(tmp_path):
    for code, _, error in run("refuse", tmp_path, 2):
        assert code == 2
        assert sentence(error) == "error: no such data; got none. Name another."


def test_one_worker_of_a_slice_alone_is_explained(tmp_path):
    environment = {"TPU_WORKER_HOSTNAMES": "127.0.0.1,127.0.0.2", "TPU_WORKER_ID": "0"}
    code, _, error = ends([begin("talk", tmp_path, {"timeout": 2.0}, **environment)])[0]
    assert code == LOST
    assert "process 1 of 2 did not arrive" in sentence(error)
    assert "one worker of a TPU slice, and the same command must run on all" in sentence(error)


# ---------------------------------------------------------------- who is there


GKE = {"TPU_WORKER_HOSTNAMES": "t-0,t-1,t-2", "TPU_WORKER_ID": "2"}
MEGASCALE = {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1", "MEGASCALE_COORDINATOR_ADDRESS": "job-0:8080"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, None),
        (GKE, ("t-0:8475", 3, 2)),
        ({**GKE, **MEGASCALE}, ("job-0:8475", 6, 5)),
    ],
)
def test_the_environment_of_a_slice(environment, expected):
    found = slice_hosts(environment)
    assert (found and (found.address, found.number, found.process)) == expected


@pytest.mark.parametrize("endpoints", ["10.0.0.1,10.0.0.2", "a:1:10.0.0.1,b:2:10.0.0.2"])
def test_the_metadata_of_a_slice(endpoints):
    values = {"worker-network-endpoints": endpoints, "agent-worker-number": "1", "tpu-env": ""}
    assert slice_hosts({}, values.__getitem__) == Hosts("10.0.0.1:8475", 2, 1)
    values["tpu-env"] = (
        "MEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\nMEGASCALE_COORDINATOR_ADDRESS: '10.0.0.9:8080'"
    )
    assert slice_hosts({}, values.__getitem__) == Hosts("10.0.0.9:8475", 4, 3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"address": "h:1"}, "need all three"),
        ({"number": 2}, "need all three"),
        ({"address": "h:1", "number": 2, "process": 2}, "no such process; got process 2 of 2"),
        ({"address": "h:1", "number": 2, "process": -1}, "no such process"),
        ({"address": "nowhere", "number": 2, "process": 0}, "HOST:PORT; got 'nowhere'"),
        ({"address": "h:99999", "number": 2, "process": 0}, "HOST:PORT"),
        ({"timeout": 0.0}, "timeout must be positive"),
    ],
)
def test_hosts_that_make_no_sense_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        Hosts(**fields)


def test_addresses():
    assert endpoint("10.0.0.2:8475") == ("10.0.0.2", 8475)
    assert endpoint("[::1]:80") == ("::1", 80)


# ---------------------------------------------------------------- the roll call alone


class Job:
    """A hub and its members in this process; `lost` collects what they are told."""

    def __init__(self, number, timeout=5.0, arriving=None):
        self.address, self.lost, self.met = free_address(), {}, {}
        Hub(self.address, number, timeout, "meet:1", "so start them.").start()
        self.members = {i: Member(i, number, self.said(i)) for i in (range(number) if arriving is None else arriving)}
        self.threads = [threading.Thread(target=self.arrive, args=(i, timeout), daemon=True) for i in self.members]
        for thread in self.threads:
            thread.start()

    def said(self, process):
        return lambda sentence: self.lost.setdefault(process, sentence)

    def arrive(self, process, timeout):
        self.met[process] = self.members[process].arrive(self.address, timeout)

    def until(self, holds):
        deadline = time.monotonic() + 20
        while not holds() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert holds(), (self.met, self.lost)


def test_all_meet_and_all_leave():
    job = Job(3)
    job.until(lambda: len(job.met) == 3)
    assert set(job.met.values()) == {"meet:1"}
    left = {}
    leaving = [threading.Thread(target=lambda i=i: left.update({i: job.members[i].leave()})) for i in range(3)]
    for thread in leaving:
        thread.start()
    for thread in leaving:
        thread.join(20)
    assert left == {0: True, 1: True, 2: True}
    assert job.lost == {}


def test_two_processes_of_one_number_are_told_apart():
    job = Job(2, arriving=[0])
    job.until(lambda: job.members[0].__dict__.get("_line") is not None)
    time.sleep(0.5)
    twin = Member(0, 2, job.said("twin"))
    threading.Thread(target=twin.arrive, args=(job.address, 5.0), daemon=True).start()
    job.until(lambda: "twin" in job.lost)
    assert job.lost == {"twin": "process 0 is not one of this job of 2: another one has that number"}


def test_a_stranger_disturbs_nobody():
    job = Job(2, arriving=[0])
    with socket.create_connection(endpoint(job.address)) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\n\nhere x y\nbye now\n")
        time.sleep(0.5)
    late = Member(1, 2, job.said(1))
    assert late.arrive(job.address, 5.0) == "meet:1"
    assert job.lost == {}


def test_an_address_that_is_taken_is_refused():
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(InputError, match=f"process 0 cannot listen on {taken}"):
            Hub(taken, 2, 1.0, "").start()


# ---------------------------------------------------------------- parts of a batch


def test_the_parts_of_a_batch_are_the_batch():
    rows = preference_rows()
    some = [replace(rows[3], step_rewards=[[1.0] * len(ids) for ids in rows[3].actions])]
    dealt = Batches([*rows[:3], *some, *rows[4:]], [Bucket(8, 8, 5)], candidates=3, seed=0)
    streamed = batches(rows, batch_size=8, seed=0, to_batch=partial(collate, prompt=8, action=5, candidates=3))
    for source in (dealt, streamed):
        for step in range(6):
            parts = [source.part(step, lambda n, i=i: np.arange(n)[i::2]) for i in range(2)]
            assert [number for _, number in parts] == [8, 8]
            for whole, even, odd in zip(
                *(jax.tree.leaves(b) for b in (source[step], parts[0][0], parts[1][0])), strict=True
            ):
                np.testing.assert_array_equal(whole[0::2], even)
                np.testing.assert_array_equal(whole[1::2], odd)
