"""One process of a job of several: python tests/host_process.py JOB FOLDER [fields of hosts.Hosts as JSON]"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import jax

from jraggym.errors import InputError, exit_on_input_error
from jraggym.hosts import Hosts, agreed, connect, fetch, joined, lead, share


def equal(folder):
    """Trains, rolls out and searches; see host_jobs."""
    import host_jobs

    host_jobs.equal(folder)


def talk(folder):
    """What the processes tell one another, as process 0 has it."""
    me = jax.process_index()
    everyone = jax.sharding.NamedSharding(
        jax.make_mesh((jax.device_count(),), ("all",)), jax.sharding.PartitionSpec("all")
    )
    spread = jax.make_array_from_callback((jax.device_count(),), everyone, lambda part: jax.numpy.arange(99)[part])
    found = {
        "share": share({"process": me, "text": "x" * 3_000 * me}),
        "agreed": agreed(f"said by {me}"),
        "joined": joined({me: "a", me + 10: "b"}),
        "fetch": [int(x) for x in fetch({"a": spread})["a"]],
        "lead": lead(),
    }
    if lead():
        (folder / "talk.json").write_text(json.dumps(found))
    print(f"process {me} prints")


def die(folder):
    """One process (DYING) is hit by a signal (BY) in the middle of the others' collectives."""
    for i in range(10_000):
        if i == 3 and jax.process_index() == int(os.environ["DYING"]):
            os.kill(os.getpid(), getattr(signal, os.environ["BY"]))
        share(i)
        time.sleep(0.05)


def fail(folder):
    """One process (DYING) stops with an error while the others wait for it."""
    if jax.process_index() == int(os.environ["DYING"]):
        raise InputError("no room", got="0 bytes", remedy="Make some.")
    share(None)


def refuse(folder):
    """All processes find the same fault."""
    raise InputError("no such data", got="none", remedy="Name another.")


if __name__ == "__main__":
    with exit_on_input_error(), connect(Hosts(**json.loads(sys.argv[3]))):
        globals()[sys.argv[1]](Path(sys.argv[2]))
