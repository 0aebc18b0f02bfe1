"""Stand-ins for gcloud, xpk, kubectl and what a TPU VM has, small programs that a test puts first on PATH.

They keep a small cloud in a state file: one queued resource, whose states follow the journey that the test chose, and
one folder for each slice, in which `ssh --command` really runs. Faults are texts and exit codes as the real ones give.
"""

import contextlib
import fcntl
import json
import os
import sys
from pathlib import Path

TOOLS = ("gcloud", "xpk")
# What setup.sh calls on a worker: installing makes a link to this Python, nothing is mounted yet. Shell, for its speed.
ON_A_WORKER = {
    "python3": """[ "$2 $3" = "uv venv" ] || exit 0
for folder; do :; done
mkdir -p "$folder/bin"
printf '#!/bin/sh\\nexec %s "$@"\\n' "$FAKE_PYTHON" > "$folder/bin/python"
chmod +x "$folder/bin/python"
""",
    "mountpoint": "exit 1\n",
    "gcsfuse": "",
    "sudo": "",
    "kubectl": "",
}


class FakeCloud:
    """The cloud as a test sets it up and looks at it."""

    def __init__(self, folder, monkeypatch):
        self.path = folder / "state.json"
        tools, here = folder / "bin", str(Path(__file__).parent)
        tools.mkdir()
        self.log = folder / "tools.log"
        scripts = {
            **{tool: f'#!/bin/sh\necho {tool} "$*" >> {self.log}\n{line}' for tool, line in ON_A_WORKER.items()},
            **{
                tool: f"#!{sys.executable} -S\nimport sys; sys.path.insert(0, {here!r}); import fake_cloud\n"
                f"fake_cloud.{tool}(sys.argv[1:])\n"
                for tool in TOOLS
            },
        }
        for tool, text in scripts.items():
            (tools / tool).write_text(text)
            (tools / tool).chmod(0o755)
        monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.setenv("FAKE_CLOUD", str(self.path))
        monkeypatch.setenv("FAKE_PYTHON", sys.executable)
        self.write({"calls": [], "journeys": [], "faults": {}, "request": None, "workload": None})

    def write(self, state):
        self.path.write_text(json.dumps(state))

    def read(self):
        return json.loads(self.path.read_text())

    def set(self, **changes):
        self.write(self.read() | changes)

    def verbs(self, tool="gcloud"):
        """What was asked of a tool of Google, in order."""
        return [verb for name, verb in self.read()["calls"] if name == tool]

    def on_workers(self, tool):
        """The arguments of each call of a worker's tool, as one text."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [line.removeprefix(f"{tool} ") for line in lines if line.startswith(f"{tool} ")]


@contextlib.contextmanager
def opened():
    """The state, alone with it."""
    path = Path(os.environ["FAKE_CLOUD"])
    with open(path.with_suffix(".lock"), "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        state = json.loads(path.read_text())
        try:
            yield state
        finally:
            path.write_text(json.dumps(state))


def flag(arguments, name):
    return next((a.split("=", 1)[1] for a in arguments if a.startswith(f"--{name}=")), None)


def fail(code, text):
    sys.stderr.write(text + "\n")
    raise SystemExit(code)


def faulty(state, verb):
    """The next fault of this verb: [exit code, text, changes of the request, whether it comes after the deed]."""
    faults = state["faults"].get(verb, [])
    return faults.pop(0) if faults else None


def gcloud(arguments):
    assert arguments[:2] == ["compute", "tpus"], arguments
    group, verb, rest = arguments[2], arguments[3], arguments[4:]
    verb = verb if group == "queued-resources" else f"node-{verb}" if verb == "describe" else verb
    with opened() as state:
        state["calls"].append(["gcloud", verb])
        fault = faulty(state, verb)
        if fault and len(fault) > 2 and fault[2] and not fault[3:]:
            state["request"] = (state["request"] or {}) | fault[2]
        if not fault and verb not in ("ssh", "scp"):
            return queued(state, verb, rest)
    if fault and not fault[3:]:
        fail(*fault[:2])
    home = Path(os.environ["FAKE_CLOUD"]).parent / "vms"
    if verb == "scp":
        node, target = rest[1].split(":")
        (home / node).mkdir(parents=True, exist_ok=True)
        (home / node / target).write_bytes(Path(rest[0]).read_bytes())
        return None
    import subprocess  # the other calls start quicker without it

    done = subprocess.run(
        ["bash", "-c", flag(rest, "command")], cwd=home / rest[0], env={**os.environ, "HOME": str(home / rest[0])}
    )
    if fault:  # the command ran, and then the connection broke or the machine vanished
        with opened() as state:
            state["request"] |= fault[2] if fault[2:] and fault[2] else {}
        fail(*fault[:2])
    raise SystemExit(done.returncode)


def queued(state, verb, rest):
    prefix = (
        f"ERROR: (gcloud.compute.tpus.{'tpu-vm.describe' if verb == 'node-describe' else f'queued-resources.{verb}'})"
    )
    missing = f"{prefix} NOT_FOUND: Resource 'projects/p/locations/z/queuedResources/{rest[0]}' was not found"
    request = state["request"]
    if verb == "create":
        if request is not None:
            fail(1, f"{prefix} ALREADY_EXISTS: Resource '{rest[0]}' already exists")
        count = int(flag(rest, "node-count") or 1)
        nodes = [flag(rest, "node-id")] if count == 1 else [f"{flag(rest, 'node-prefix')}-{i}" for i in range(count)]
        journey = state["journeys"].pop(0) if state["journeys"] else ["ACTIVE"]
        state["request"] = {"journey": journey, "nodes": nodes, "type": flag(rest, "accelerator-type")}
        return
    if request is None:
        fail(1, missing)
    if verb == "delete":
        state["request"] = None
    elif verb == "describe":
        journey = request["journey"]
        now = journey.pop(0) if len(journey) > 1 else journey[0]
        status = {"state": now, "stateInitiator": "SERVICE"}
        if now == "FAILED":
            status["failedData"] = {"error": {"code": 8, "message": "Quota limit 'TPUV5P' has been exceeded. Limit: 0"}}
        nodes = [{"nodeId": node, "node": {"acceleratorType": request["type"]}} for node in request["nodes"]]
        print(json.dumps({"name": rest[0], "state": status, "tpu": {"nodeSpec": nodes}}))
    elif verb == "node-describe":
        print(request.get("node_state", "READY"))


def xpk(arguments):
    verb, rest = arguments[1], arguments[2:]
    verb = "wait" if flag(rest, "wait-for-job-completion") else verb
    with opened() as state:
        state["calls"].append(["xpk", verb])
        if fault := faulty(state, verb):
            fail(*fault[:2])
        workload = state["workload"]
        if verb == "create":
            if workload is not None:
                fail(1, f"[XPK] {flag(rest, 'workload')} already exists, XPK will not create this workload.")
            state["workload"] = {"name": flag(rest, "workload"), "status": "RUNNING"}
        elif verb == "delete":
            state["workload"] = None
        elif verb == "list":
            print("Jobset Name    Created Time    Priority    Status")
            if workload and flag(rest, "filter-by-status") in ("EVERYTHING", workload["status"]):
                print(f"{workload['name']}    2026-1-1T1:00:00Z    medium    {workload['status']}")
        elif verb == "wait":
            print("[XPK] Waiting for the workload")
            raise SystemExit(125 if workload["status"] == "FAILED" else 0)
