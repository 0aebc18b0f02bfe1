"""Calls that raise or hang become data."""

import subprocess
import sys
import threading
import time

import pytest

from jraggym.retrieval.guard import guarded


def test_a_result_is_handed_on():
    assert guarded(lambda: [1, 2], 5.0) == ([1, 2], None)
    assert guarded(lambda: None, 5.0) == (None, None)


@pytest.mark.parametrize("failure", [ValueError("no index"), SystemExit("bye"), KeyboardInterrupt("stop")])
def test_whatever_is_raised_becomes_text(failure):
    def call():
        raise failure

    assert guarded(call, 5.0) == (None, f"{type(failure).__name__}: {failure}")


def test_a_call_that_hangs_is_given_up_and_its_late_result_is_dropped():
    release, ended = threading.Event(), threading.Event()

    def call():
        release.wait(20)
        ended.set()
        return "late"

    start = time.monotonic()
    outcome = guarded(call, 0.05)
    assert time.monotonic() - start < 5.0
    assert outcome == (None, "no answer within 0.05 seconds")
    release.set()
    assert ended.wait(5.0)
    assert outcome == (None, "no answer within 0.05 seconds")
    assert guarded(lambda: "next", 5.0) == ("next", None)


def test_a_call_that_hangs_does_not_keep_the_program_alive():
    program = "import time; from jraggym.retrieval.guard import guarded; print(guarded(lambda: time.sleep(60), 0.05))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True)
    assert "no answer within" in done.stdout
