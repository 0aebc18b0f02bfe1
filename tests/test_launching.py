"""The command lines of a launch, word for word, and a launch on stand-ins for gcloud and xpk that fail as those do."""

import os
import shlex
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from fake_cloud import FakeCloud

from jraggym.errors import InputError
from jraggym.launching import gke, local, pod, processes, tpu_vm
from jraggym.launching.gke import Gke
from jraggym.launching.local import Local
from jraggym.launching.processes import LaunchError, Preempted, Stopped
from jraggym.launching.topology import parse
from jraggym.launching.tpu_vm import TpuVm
from train import launch

ROOT = Path(__file__).resolve().parents[1]
PLACE = ["--project=my-project", "--zone=us-east5-a"]
COMMAND = ["python", "-m", "train.dpo", "synthhop", "--out", "/bucket/runs/it's mine; $HOME"]
QUICK = {"poll": 0.02, "backoff": 0.02, "restarts": 3}


def tpu(**changes):
    return TpuVm(**({"name": "dpo", "topology": "v5p:4x4x4", "project": "my-project", "zone": "us-east5-a"} | changes))


def cluster(**changes):
    given = {"name": "dpo", "topology": "v6e:16x16", "cluster": "pod", "image": "registry/jraggym:1"}
    return Gke(**(given | {"project": "my-project", "zone": "us-east5-a"} | changes))


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "PAUSE", 0.01)
    monkeypatch.setattr(pod, "GRACE", 2.0)
    return FakeCloud(tmp_path, monkeypatch)


class Told(list):
    """What a launch shows and reports."""

    def text(self):
        return "\n".join(self)


@pytest.fixture
def told():
    return Told()


# ---------------------------------------------------------------- command lines


@pytest.mark.parametrize(
    ("topology", "accelerator"),
    [
        ("v5e:8x8", "v5litepod-64"),
        ("v5p:2x2x1", "v5p-8"),
        ("v5p:4x4x4", "v5p-128"),
        ("v6e:16x16", "v6e-256"),
        ("4xv5e:4x8", "v5litepod-32"),
    ],
)
def test_a_topology_has_googles_name(topology, accelerator):
    assert parse(topology).accelerator_type == accelerator


def test_one_slice_on_demand():
    assert tpu_vm.create(tpu()) == [
        *"gcloud compute tpus queued-resources create dpo".split(),
        *PLACE,
        "--accelerator-type=v5p-128",
        "--runtime-version=v2-alpha-tpuv5",
        "--node-id=dpo",
        "--scopes=https://www.googleapis.com/auth/cloud-platform",
        "--quiet",
    ]


def test_two_spot_slices_on_a_network_of_their_own():
    settings = tpu(topology="2xv6e:16x16", capacity="spot", network="net", subnetwork="sub", service_account="me@x")
    assert tpu_vm.create(settings) == [
        *"gcloud compute tpus queued-resources create dpo".split(),
        *PLACE,
        "--accelerator-type=v6e-256",
        "--runtime-version=v2-alpha-tpuv6e",
        "--node-count=2",
        "--node-prefix=dpo",
        "--scopes=https://www.googleapis.com/auth/cloud-platform",
        "--spot",
        "--network=net",
        "--subnetwork=sub",
        "--service-account=me@x",
        "--quiet",
    ]


def test_a_reserved_slice_with_another_image():
    line = tpu_vm.create(tpu(topology="v5e:4x4", capacity="reserved", runtime="my-image"))
    assert {"--reserved", "--runtime-version=my-image", "--accelerator-type=v5litepod-16"} < {*line}


def test_a_whole_launch_on_two_slices():
    settings = tpu(topology="2xv5p:4x4x4", bucket="my-bucket", delete_after=True)
    queued = [["gcloud", "compute", "tpus", "queued-resources", verb, "dpo", *PLACE] for verb in ("describe", "delete")]
    vm = ["gcloud", "compute", "tpus", "tpu-vm"]
    locked = (
        "flock -n -E 0 jraggym-dpo/run/lock sh -c 'tar -xzf jraggym-dpo.tar.gz -C "
        "jraggym-dpo && exec bash jraggym-dpo/jraggym/launching/setup.sh jraggym-dpo my-bucket'"
    )
    install = f"mkdir -p jraggym-dpo/run && flock jraggym-dpo/run/install sh -c {shlex.quote(locked)}"
    start = (
        "cd jraggym-dpo && exec .venv/bin/python -m jraggym.launching.worker --folder run --attempt ATTEMPT -- "
        "python -m train.dpo synthhop --out '/bucket/runs/it'\"'\"'s mine; $HOME'"
    )
    both = ("dpo-0", "dpo-1")
    assert tpu_vm.plan(settings, COMMAND) == [
        tpu_vm.create(settings),
        [*queued[0], "--format=json"],
        *([*vm, "describe", node, *PLACE, "--format=value(state)"] for node in both),
        tpu_vm.pack("project.tar.gz"),
        *(
            [*vm, "scp", "project.tar.gz", f"{node}:jraggym-dpo.tar.gz", *PLACE, "--worker=all", "--quiet"]
            for node in both
        ),
        *([*vm, "ssh", node, *PLACE, "--worker=all", f"--command={install}", "--quiet"] for node in both),
        *([*vm, "ssh", node, *PLACE, "--worker=all", f"--command={start}", "--quiet"] for node in both),
        [*queued[1], "--force", "--quiet"],
    ]


def test_a_shell_reads_the_remote_line_as_it_was_given(tmp_path):
    """Quotes, dollars and semicolons of the command reach the program as they are."""
    line = tpu_vm.worker_line(tpu(), COMMAND, attempt="a").split(" && exec ")[1]
    words = subprocess.run(["bash", "-c", f"printf '%s\\n' {line}"], capture_output=True, text=True, check=True).stdout
    assert words.splitlines()[-len(COMMAND) :] == COMMAND


def test_logs_and_delete():
    line = "cd jraggym-dpo && exec .venv/bin/python -m jraggym.launching.worker --folder run"
    vm = ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "dpo-0", *PLACE]
    settings = tpu(topology="2xv5p:4x4x4", do="logs")
    assert tpu_vm.plan(settings, []) == [[*vm, "--worker=0", f"--command={line}", "--quiet"]]
    delete = ["gcloud", "compute", "tpus", "queued-resources", "delete", "dpo", *PLACE, "--force", "--quiet"]
    assert tpu_vm.plan(tpu(do="delete"), []) == [delete]


def test_a_launch_on_gke():
    where = ["--cluster=pod", *PLACE]
    assert gke.plan(cluster(topology="2xv5p:4x4x8", restarts=5), COMMAND) == [
        [
            *["xpk", "workload", "create", *where, "--workload=dpo", "--tpu-type=v5p-256", "--num-slices=2"],
            *["--docker-image=registry/jraggym:1", "--max-restarts=5", "--restart-on-exit-codes=69,75"],
            "--termination-grace-period-seconds=120",
            f"--command=exec {shlex.join(COMMAND)}",
        ],
        ["xpk", "workload", "list", *where, "--wait-for-job-completion=dpo"],
    ]
    assert gke.plan(cluster(do="delete"), []) == [
        ["xpk", "workload", "delete", *where, "--workload=dpo", "--force"],
    ]
    assert gke.plan(cluster(do="logs"), [])[-1] == "kubectl logs --follow --tail=200 job/dpo-slice-job-0".split()


def test_sigterm_reaches_a_command_that_the_shell_of_xpk_starts(tmp_path):
    """xpk runs (COMMAND) & and sends SIGTERM to that subshell: `exec` makes it the command itself."""
    program = (
        "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(75)); print('up', flush=True); time.sleep(9)"
    )
    line = f"exec {shlex.join([sys.executable, '-S', '-c', program])}"
    shell = subprocess.Popen(["bash", "-c", f"({line}) & P=$!; echo $P; wait $P"], stdout=subprocess.PIPE, text=True)
    with shell.stdout as output:
        os.kill(int(output.readline()), signal.SIGTERM if output.readline() == "up\n" else 0)
    assert shell.wait() == 75


def test_local_processes_know_their_number():
    group = local.commands(Local(hosts=2), ["python", "-m", "train.sft", "synthhop"], port=1234)
    shared = [sys.executable, "-m", "train.sft", "synthhop", "--hosts.address", "127.0.0.1:1234", "--hosts.number", "2"]
    assert group == {i: [*shared, "--hosts.process", i] for i in "01"}
    assert local.environment(Local(devices=4)) == {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4"}
    assert local.environment(Local()) == {}


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        (tpu(name="Dpo"), "no name of a job; got 'Dpo'"),
        (tpu(name="dpo-"), "no name of a job"),
        (tpu(name="d" * 40), "39 in all"),
        (tpu(project=""), "--project ID"),
        (tpu(zone="us-east5"), "no zone; got 'us-east5'"),
        (tpu(topology="v5p-128"), "no topology; got 'v5p-128'"),
        (tpu(topology="0xv5p:4x4x4"), "no topology"),
        (tpu(topology="v9:4x4"), "unknown TPU; got 'v9'. Use one of v5e, v5p, v6e"),
        (tpu(topology="v5p:4x4"), "v5p has no slice of this shape; got 4x4"),
        (tpu(topology="v5e:3x3"), "16x16"),
        (tpu(bucket="gs://my-bucket"), "Write the name alone"),
        (tpu(restarts=-1), "--restarts is below zero"),
        (tpu(do="delete"), "takes no command"),
        (cluster(cluster=""), "no cluster"),
        (cluster(image=""), "no container image"),
        (Local(hosts=0), "there is no process to start"),
        (Local(devices=0), "a process needs a device"),
    ],
)
def test_bad_settings_are_refused_before_anything_runs(settings, fault):
    with pytest.raises(InputError, match=fault.replace("(", r"\(")):
        launch.planned(settings, COMMAND)


@pytest.mark.parametrize("settings", [tpu(), cluster(), Local()], ids=["tpu-vm", "gke", "local"])
def test_commands_that_cannot_be_carried(settings):
    with pytest.raises(InputError, match="there is no command to launch"):
        launch.planned(settings, [])
    if not isinstance(settings, Local):
        with pytest.raises(InputError, match="has a line break; got 'b"):
            launch.planned(settings, ["a", "b\nc"])


def test_a_missing_tool_is_named(monkeypatch, tmp_path, told):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="gcloud is not installed"):
        pod.run(tpu(), COMMAND, told.append, told.append)
    with pytest.raises(InputError, match="xpk is not installed"):
        gke.run(cluster(), COMMAND, told.append, told.append)


def run_entry(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["launch", *arguments])
    try:
        launch.main()
    except SystemExit as ended:
        return ended.code
    return 0


TPU_VM = "tpu-vm --name dpo --topology v5p:4x4x4 --project my-project --zone us-east5-a".split()


def test_the_entry_prints_the_commands_and_runs_none(cloud, monkeypatch, capsys):
    assert run_entry(monkeypatch, *TPU_VM, "--capacity", "spot", "--dry-run", "--", *COMMAND) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [shlex.split(line) for line in lines] == tpu_vm.plan(tpu(capacity="spot"), COMMAND)
    assert cloud.verbs() == []


def test_the_entry_tells_bad_input_and_failures_apart(cloud, monkeypatch, capsys):
    assert run_entry(monkeypatch, *TPU_VM, "--zone", "nowhere", "--", *COMMAND) == 2
    assert "error: no zone; got 'nowhere'" in capsys.readouterr().err
    cloud.set(faults={"create": [[1, "ERROR: PERMISSION_DENIED: Permission 'tpu.nodes.create' denied"]]})
    assert run_entry(monkeypatch, *TPU_VM, "--poll", "0.02", "--", *COMMAND) == 1
    error = capsys.readouterr().err
    assert "Permission 'tpu.nodes.create' denied" in error
    assert "role TPU Admin" in error


# ---------------------------------------------------------------- on TPU VMs


def script(tmp_path, text, name="job"):
    """A command for the workers; what it says and how it ends is the test's."""
    path = tmp_path / f"{name}.sh"
    path.write_text(text)
    return ["bash", str(path)]


def until(met, seconds=30.0):
    """Waits until `met()`; a test that would wait for ever fails instead."""
    deadline = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < deadline, "what the test waits for did not happen"
        time.sleep(0.02)


def starts(tmp_path):
    """How often the script ran, which writes a line each time."""
    path = tmp_path / "starts"
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_a_launch_from_nothing_to_the_end(cloud, tmp_path, told):
    command = script(tmp_path, f"echo start >> {tmp_path}/starts; echo hello from $(basename $HOME); pwd")
    cloud.set(journeys=[["CREATING", "WAITING_FOR_RESOURCES", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]])
    settings = tpu(topology="2xv5p:4x4x4", bucket="my-bucket", delete_after=True, **QUICK)
    pod.run(settings, command, told.append, told.append)
    assert starts(tmp_path) == 2
    assert "[dpo-0] hello from dpo-0" in told
    assert f"[dpo-1] {tmp_path}/vms/dpo-1/jraggym-dpo" in told
    assert told.text().count("dpo: WAITING_FOR_RESOURCES") == 1  # a change is told once
    verbs = ["describe", "create", *["describe"] * 5, *["node-describe"] * 2, *["scp"] * 2, *["ssh"] * 4, "delete"]
    assert cloud.verbs() == verbs
    assert cloud.read()["request"] is None
    assert cloud.on_workers("gcsfuse") == ["--implicit-dirs my-bucket /bucket"] * 2
    installed = "-m uv pip install --quiet --python jraggym-dpo/.venv/bin/python -e jraggym-dpo[offline] jax[tpu]"
    assert cloud.on_workers("python3").count(installed) == 2


def test_a_slice_that_is_there_is_used_and_held(cloud, tmp_path, told):
    cloud.set(request={"journey": ["ACTIVE"], "nodes": ["dpo"], "type": "v5p-128"})
    pod.run(tpu(**QUICK), script(tmp_path, "echo done"), told.append, told.append)
    assert "create" not in cloud.verbs()
    assert "delete" not in cloud.verbs()
    assert "held, and paid for" in told[-1]


@pytest.mark.parametrize("state", ["SUSPENDED", "FAILED"])
def test_a_dead_request_is_deleted_and_made_again(cloud, tmp_path, told, state):
    cloud.set(request={"journey": [state], "nodes": ["dpo"], "type": "v5p-128"})
    pod.run(tpu(**QUICK), script(tmp_path, "exit 0"), told.append, told.append)
    assert cloud.verbs()[:4] == ["describe", "delete", "describe", "create"]


def test_a_request_that_another_launch_made_meanwhile_is_shared(cloud, tmp_path, told):
    theirs = {"journey": ["PROVISIONING", "ACTIVE"], "nodes": ["dpo"], "type": "v5p-128"}
    cloud.set(faults={"create": [[1, "ERROR: ALREADY_EXISTS: Resource 'dpo' already exists", theirs]]})
    pod.run(tpu(**QUICK), script(tmp_path, "exit 0"), told.append, told.append)
    assert cloud.verbs()[:4] == ["describe", "create", "describe", "describe"]


@pytest.mark.parametrize(
    ("nodes", "accelerator", "fault"),
    [(["dpo"], "v5p-8", "got 1 x v5p-8"), (["dpo-0", "dpo-1"], "v5p-128", "got 2 x v5p-128")],
)
def test_slices_of_another_shape_or_number_are_not_taken(cloud, told, nodes, accelerator, fault):
    cloud.set(request={"journey": ["ACTIVE"], "nodes": nodes, "type": accelerator})
    with pytest.raises(InputError, match=f"dpo is not 1 x v5p-128; {fault}"):
        pod.run(tpu(**QUICK), COMMAND, told.append, told.append)


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("RESOURCE_EXHAUSTED: Quota limit 'TPUV5PPerProjectPerZone' has been exceeded. Limit: 0", "more quota"),
        ("PERMISSION_DENIED: Permission 'tpu.queuedResources.create' denied", "TPU Admin"),
        (
            'INVALID_ARGUMENT: type "v5p-128" could not be found in the zonal accelerator configurations',
            "another --zone",
        ),
    ],
)
def test_a_refusal_is_told_with_what_to_do(cloud, told, text, remedy):
    cloud.set(faults={"create": [[1, f"ERROR: (gcloud.compute.tpus.queued-resources.create) {text}"]]})
    with pytest.raises(LaunchError, match=remedy) as error:
        pod.run(tpu(**QUICK), COMMAND, told.append, told.append)
    assert text in str(error.value)
    assert cloud.verbs() == ["describe", "create"]  # nothing is tried twice


def test_a_request_that_fails_in_the_queue_is_told(cloud, told):
    cloud.set(journeys=[["WAITING_FOR_RESOURCES", "FAILED"]])
    with pytest.raises(LaunchError, match="Quota limit 'TPUV5P' has been exceeded") as error:
        pod.run(tpu(**QUICK), COMMAND, told.append, told.append)
    assert "more quota" in str(error.value)


def test_a_long_wait_ends_and_leaves_the_request(cloud, told):
    cloud.set(journeys=[["WAITING_FOR_RESOURCES"]])
    with pytest.raises(LaunchError, match=r"no slice after .* stays in the queue .*WAITING_FOR_RESOURCES") as error:
        pod.run(tpu(wait_hours=1 / 3600, **QUICK), COMMAND, told.append, told.append)
    assert error.value.code == 75
    assert "delete" not in cloud.verbs()


def test_a_passing_fault_of_the_api_is_tried_again(cloud, tmp_path, told):
    cloud.set(faults={"describe": [[1, "ERROR: UNAVAILABLE: The service is currently unavailable."]] * 2})
    pod.run(tpu(**QUICK), script(tmp_path, "exit 0"), told.append, told.append)
    assert cloud.verbs()[:4] == ["describe", "describe", "describe", "create"]


def test_a_broken_connection_starts_nothing_twice(cloud, tmp_path, told):
    """ssh ends with 255 while the command runs on; the second connection shows the same run to its end."""
    command = script(tmp_path, f"echo start >> {tmp_path}/starts; echo one; sleep 0.5; echo two; exit 3")
    broken = [255, "client_loop: send disconnect: Broken pipe\nERROR: [/usr/bin/ssh] exited with return code [255]."]
    cloud.set(faults={"scp": [broken], "ssh": [None, broken, [*broken, None, "late"]]})
    with pytest.raises(LaunchError, match="exit code 3") as error:
        pod.run(tpu(**QUICK), command, told.append, told.append)
    assert starts(tmp_path) == 1
    assert told.text().count("the connection broke") == 3
    assert "    two" in str(error.value)
    assert error.value.code == 3
    assert cloud.read()["request"] is not None


def test_a_slice_that_stays_unreachable_is_told(cloud, told):
    cloud.set(faults={"scp": [[255, "ssh: connect to host 10.0.0.1 port 22: Connection refused"]] * pod.CONNECTIONS})
    with pytest.raises(LaunchError, match="cannot be reached, though it is ready") as error:
        pod.run(tpu(**QUICK), COMMAND, told.append, told.append)
    assert "Connection refused" in str(error.value)


def test_a_preempted_slice_is_made_again_and_the_command_run_again(cloud, tmp_path, told):
    command = script(tmp_path, f"echo start >> {tmp_path}/starts; echo step")
    gone = [255, "Connection to 10.0.0.1 closed by remote host.", {"journey": ["SUSPENDING", "SUSPENDED"]}, "late"]
    cloud.set(faults={"ssh": [None, gone]})
    pod.run(tpu(capacity="spot", **QUICK), command, told.append, told.append)
    assert starts(tmp_path) == 2
    assert "; restart 1 of 3 in 0 s" in told.text()
    after = cloud.verbs()[cloud.verbs().index("ssh") :]
    assert after[2:8] == ["describe", "describe", "delete", "describe", "create", "describe"]


def test_a_slice_that_vanished_before_the_queue_knows_is_preempted(cloud, tmp_path, told):
    gone = [1, "ERROR: This TPU has terminal state PREEMPTED", {"node_state": "PREEMPTED"}]
    cloud.set(faults={"ssh": [gone]})
    pod.run(tpu(**QUICK), script(tmp_path, "exit 0"), told.append, told.append)
    assert cloud.verbs().count("create") == 2


def test_exit_code_75_runs_the_command_again_on_all_slices(cloud, tmp_path, told):
    once = f"echo start >> {tmp_path}/starts; mkdir $HOME/saved 2> /dev/null && exit 75; exit 0"
    pod.run(tpu(topology="2xv6e:4x4", **QUICK), script(tmp_path, once), told.append, told.append)
    assert starts(tmp_path) == 4
    assert cloud.verbs().count("create") == 1


WORKERS = "##### Command execution on worker {} failed with exit status {}. Continuing."


def test_workers_that_only_miss_another_one_are_started_again(cloud, tmp_path, told):
    """gcloud ends with worker 0's code, 69; worker 1, whose machine restarted, could not be reached."""
    fault = [69, "\n".join([WORKERS.format(0, 69), WORKERS.format(2, 69), WORKERS.format(1, 255)]), None, "late"]
    cloud.set(faults={"ssh": [None, fault]})
    pod.run(tpu(**QUICK), script(tmp_path, "exit 0"), told.append, told.append)
    assert "a worker is gone; restart 1 of 3" in told.text()


def test_the_worker_that_failed_by_itself_decides(cloud, tmp_path, told):
    fault = [69, "\n".join([WORKERS.format(0, 69), WORKERS.format(1, 75), WORKERS.format(3, 1)]), None, "late"]
    cloud.set(faults={"ssh": [None, fault]})
    with pytest.raises(LaunchError, match=r"dpo: exit code 1. The slices are still held") as error:
        pod.run(tpu(**QUICK), script(tmp_path, "exit 0"), told.append, told.append)
    assert error.value.code == 1


def test_restarts_come_to_an_end(cloud, tmp_path, told):
    command = script(tmp_path, f"echo start >> {tmp_path}/starts; exit 75")
    with pytest.raises(Preempted) as error:
        pod.run(tpu(**QUICK | {"restarts": 1}), command, told.append, told.append)
    assert error.value.code == 75
    assert starts(tmp_path) == 2


def test_the_pause_between_restarts_doubles_until_a_start_lasts(monkeypatch, told):
    clock, pauses, lasts = [0.0], [], iter([1, 1, 1, 1000, 1, 1])  # seconds
    monkeypatch.setattr(processes, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(time, "sleep", pauses.append)

    def start(number):
        clock[0] += next(lasts)
        if number < 5:
            raise Preempted("gone")
        return number

    assert processes.with_restarts(start, 9, told.append, backoff=10, longest=30) == 5
    assert pauses == [10, 20, 30, 10, 20]
    assert told[-1] == "gone; restart 5 of 9 in 20 s"


def test_slices_that_somebody_gave_back_are_not_made_again(cloud, tmp_path, told):
    gone = [255, "Connection closed", {"journey": ["DELETING"]}, "late"]
    cloud.set(faults={"ssh": [None, gone]})
    with pytest.raises(LaunchError, match="somebody gave the slices back"):
        pod.run(tpu(**QUICK), script(tmp_path, "sleep 0.1"), told.append, told.append)
    assert cloud.verbs().count("create") == 1


def test_a_second_launch_watches_the_first_ones_run(cloud, tmp_path, told):
    """The first launcher is gone; its command still runs. A launch of the same name installs and starts nothing."""
    waits = f"echo start >> {tmp_path}/starts; echo first; until [ -e {tmp_path}/go ]; do sleep 0.05; done; exit 4"
    command = script(tmp_path, waits)

    def launcher():
        with pytest.raises(LaunchError, match="exit code 4"):
            pod.run(tpu(**QUICK), command, told.append, told.append)

    first = threading.Thread(target=launcher)
    first.start()
    until(lambda: starts(tmp_path))
    installs = len(cloud.on_workers("python3"))
    second = Told()
    other = script(tmp_path, "echo other", "other")

    def show(line):
        second.append(line)
        if line == "first":  # it watches: the command may end
            (tmp_path / "go").touch()

    with pytest.raises(LaunchError, match="exit code 4"):
        pod.run(tpu(**QUICK), other, show, second.append)
    first.join(timeout=30)
    assert starts(tmp_path) == 1
    assert "still runs: it is shown, and nothing new is started" in second.text()
    assert "first" in second
    assert len(cloud.on_workers("python3")) == installs
    logs = Told()
    with pytest.raises(LaunchError, match="no log could be shown"):  # the run's own exit code is told, too
        pod.run(tpu(do="logs", **QUICK), [], logs.append, logs.append)
    assert logs[0] == "first"


def test_delete_is_fine_when_nothing_is_there(cloud, told):
    pod.run(tpu(do="delete"), [], told.append, told.append)
    cloud.set(faults={"delete": [[1, "ERROR: PERMISSION_DENIED: no"]]})
    with pytest.raises(LaunchError, match="may still be paid for"):
        pod.run(tpu(do="delete"), [], told.append, told.append)


def test_the_packed_project_is_the_code_alone(tmp_path, monkeypatch):
    subprocess.run(tpu_vm.pack(str(tmp_path / "p.tar.gz")), check=True)
    with tarfile.open(tmp_path / "p.tar.gz") as tar:
        names = tar.getnames()
    assert {"pyproject.toml", "jraggym/launching/setup.sh", "eval/published.json", "train/dpo.py"} < {*names}
    assert not [name for name in names if "__pycache__" in name or name.startswith(("runs", "tests", "."))]
    monkeypatch.setattr(tpu_vm, "ROOT", tmp_path)
    with pytest.raises(InputError, match="Launch from a checkout"):
        tpu_vm.pack("q.tar.gz")


# ---------------------------------------------------------------- a worker


def worker(folder, *arguments):
    line = [sys.executable, "-S", "-m", "jraggym.launching.worker", "--folder", str(folder), *arguments]
    return subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_a_command_outlives_the_connection_and_runs_once(tmp_path):
    waits = script(
        tmp_path, f"echo start >> {tmp_path}/starts; until [ -e {tmp_path}/go ]; do sleep 0.02; done; exit 9"
    )
    start = ("--attempt", "a", "--", *waits)
    connection = worker(tmp_path / "run", *start)
    until(lambda: starts(tmp_path))
    connection.kill()
    connection.communicate()
    again = worker(tmp_path / "run", *start)
    time.sleep(0.3)
    (tmp_path / "go").touch()
    again.communicate()
    assert again.returncode == 9
    over = worker(tmp_path / "run", *start)  # the attempt is over: its end is told, nothing is started
    over.communicate()
    assert over.returncode == 9
    assert starts(tmp_path) == 1


def test_a_newer_attempt_replaces_one_that_runs(tmp_path):
    old = script(
        tmp_path,
        f"trap 'echo saved > {tmp_path}/saved; exit 75' TERM; echo > {tmp_path}/up; while :; do sleep 0.05; done",
    )
    first = worker(tmp_path / "run", "--attempt", "a", "--", *old)
    until((tmp_path / "up").exists)
    second = worker(tmp_path / "run", "--attempt", "b", "--replace", "--", "bash", "-c", "echo new")
    output, _ = second.communicate()
    first.communicate()
    assert (first.returncode, second.returncode) == (75, 0)
    assert "attempt a is ended first" in output
    assert output.endswith("new\n")
    assert (tmp_path / "saved").exists()


def test_a_worker_without_a_run_and_one_that_lost_it(tmp_path):
    nothing = worker(tmp_path / "run")
    assert nothing.communicate()[0] == "launch: no command was started here\n"
    assert nothing.returncode == 66
    (tmp_path / "run" / "a").mkdir()
    (tmp_path / "run" / "a" / "log").write_text("step 1\n")
    (tmp_path / "run" / "current").write_text("a")
    lost = worker(tmp_path / "run")
    assert "vanished without an exit code" in lost.communicate()[0]
    assert lost.returncode == 75
    unknown = worker(tmp_path / "run", "--attempt", "b", "--", "no-such-program")
    assert "cannot start no-such-program" in unknown.communicate()[0]
    assert unknown.returncode == 127


# ---------------------------------------------------------------- on GKE


def test_a_workload_is_submitted_once(cloud, told):
    gke.run(cluster(), COMMAND, told.append, told.append)
    assert cloud.verbs("xpk") == ["create", "wait"]
    gke.run(cluster(), COMMAND, told.append, told.append)
    assert cloud.verbs("xpk")[2:] == ["create", "list", "wait"]
    assert "nothing new is started" in told.text()
    gke.run(cluster(do="logs"), [], told.append, told.append)
    gke.run(cluster(do="delete"), [], told.append, told.append)
    assert cloud.read()["workload"] is None


def test_a_failed_workload_is_told_and_replaced(cloud, told):
    cloud.set(workload={"name": "dpo", "status": "FAILED"}, faults={"wait": [[125, "[XPK] JobSet failed"]]})
    with pytest.raises(LaunchError, match="the workload failed") as error:
        gke.run(cluster(), COMMAND, told.append, told.append)
    assert cloud.verbs("xpk") == ["create", "list", "delete", "create", "wait"]
    assert "[XPK] JobSet failed" in str(error.value)
    assert error.value.code == 125


def test_a_cluster_that_refuses_is_told(cloud, told):
    cloud.set(faults={"create": [[1, "[XPK] v6e-256 is not available in cluster pod"]]})
    with pytest.raises(LaunchError, match=r"cannot be started: (.|\n)*is not available in cluster"):
        gke.run(cluster(), COMMAND, told.append, told.append)


# ---------------------------------------------------------------- on this machine


def python(text):
    return [sys.executable, "-S", "-c", text]


def test_local_processes_run_side_by_side(told):
    given = "import os, sys; print(*sys.argv[1:], os.environ['JAX_NUM_CPU_DEVICES'])"
    local.run(Local(devices=3), python(given), told.append, told.append)
    assert [line.split()[0] for line in sorted(told)] == ["[0]", "[1]"]
    assert all(line.split()[-2:] == [str(i), "3"] for i, line in enumerate(sorted(told)))


def test_a_local_failure_ends_the_others_and_is_told(told):
    text = "import sys, time; print('step'); sys.exit(7) if sys.argv[-1] == '1' else time.sleep(600)"
    with pytest.raises(LaunchError, match=r"process 1 ended with exit code 7(.|\n)*step") as error:
        local.run(Local(), python(text), told.append, told.append)
    assert error.value.code == 7


def test_a_local_preemption_runs_the_command_again(tmp_path, told):
    saved = f"{str(tmp_path / 'saved')!r} + sys.argv[-1]"
    text = f"import os, sys\nif not os.path.exists({saved}): open({saved}, 'w').close(); sys.exit(75)"
    local.run(Local(backoff=0.02), python(text), told.append, told.append)
    assert "; restart 1 of 3 in 0 s" in told.text()
    with pytest.raises(Preempted):
        local.run(Local(restarts=1, backoff=0.02), python("import sys; sys.exit(75)"), told.append, told.append)


def test_a_signal_to_the_launcher_reaches_every_process_once(told):
    """They save, one longer than the other, and end with 75; the launcher does not start them again."""
    text = (
        "import signal, sys, time\n"
        "def save(*_):\n"
        "    signal.signal(15, lambda *_: sys.exit(1)); time.sleep(0.3 + 0.5 * int(sys.argv[-1]))\n"
        "    print('saved'); sys.exit(75)\n"
        "signal.signal(15, save); print('up', flush=True); time.sleep(60)"
    )

    def show(line):
        told.append(line)
        if sum("up" in one for one in told) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            told.append("sent, by now")

    with pytest.raises(Stopped, match="ended by SIGTERM; exit codes: 0 75, 1 75"):
        local.run(Local(), python(text), show, told.append)
    assert sum("saved" in line for line in told) == 2


def test_output_that_is_no_utf8_and_a_process_that_a_signal_ended(told):
    text = "import os, sys; sys.stdout.buffer.write(b'\\xff\\n'); sys.stdout.flush(); os.kill(os.getpid(), 9)"
    with pytest.raises(LaunchError) as error:
        local.run(Local(hosts=1), python(text), told.append, told.append)
    assert error.value.code == 137
    assert told[0] == "�"
