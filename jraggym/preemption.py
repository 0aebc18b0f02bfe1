"""Being asked to end: SIGTERM (the machine is taken away) or SIGINT stops a job at its next step, with its state saved.

    with preemptible():        around an entry: exit code 75 says that the same command goes on from there
        should_stop()          in a loop over steps: save, then raise Preempted
        stop_if_asked()        in a loop that leaves whole pieces behind: there is nothing to save

The signal itself only sets a flag; a second one ends the process at once. On several hosts jax agrees on the step: it
hears of a SIGTERM to any of them, and `should_stop` becomes true on all of them at the same call.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import jax
from jax.experimental import multihost_utils

from jraggym.errors import PREEMPTED

_asked = threading.Event()
_checks = itertools.count(1)  # jax knows a step by its number, and stages begin anew at step 0: we count for all


class Preempted(Exception):
    """A signal has asked the job to end. What there was to save is saved."""


def should_stop() -> bool:
    """Whether to save and raise `Preempted` now. Every process of the job asks equally often, at the same places."""
    if jax.distributed.is_initialized():
        return multihost_utils.reached_preemption_sync_point(next(_checks))
    return _asked.is_set()


def stop_if_asked() -> None:
    """Raises `Preempted`, in any thread, if a signal came and this process is alone: others would wait for it."""
    if _asked.is_set() and not jax.distributed.is_initialized():
        raise Preempted


@contextmanager
def preemptible() -> Iterator[None]:
    """Listens to SIGTERM and SIGINT; turns a `Preempted` inside the block into one line on stderr and exit code 75."""
    try:
        with _listening():
            yield
    except Preempted as stop:
        sys.stderr.write("preempted: what was done is saved; run the same command again to go on\n")
        raise SystemExit(PREEMPTED) from stop


@contextmanager
def _listening() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # elsewhere Python refuses to set handlers
        yield
        return
    # A handler of Python's runs in the main thread, which may be inside a device's program for minutes. The pipe is
    # written at once, and a thread of its own reads it.
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    caught = [signal.SIGINT] if jax.distributed.is_initialized() else [signal.SIGINT, signal.SIGTERM]
    before = {number: signal.signal(number, lambda *_: _asked.set()) for number in caught}
    fd = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    listener = threading.Thread(target=_listen, args=(reading,), name="signals", daemon=True)
    listener.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(fd)
        os.close(writing)  # which ends the listener
        listener.join()
        for number, handler in before.items():
            signal.signal(number, handler)
        _asked.clear()


def _listen(reading: int) -> None:
    heard = 0
    with os.fdopen(reading, "rb", buffering=0) as pipe:
        while number := pipe.read(1):
            if number[0] not in (signal.SIGINT, signal.SIGTERM):
                continue
            heard += 1
            if heard > 1:
                os._exit(128 + number[0])  # what a shell calls death by this signal
            _asked.set()
            if number[0] == signal.SIGINT and jax.distributed.is_initialized():
                os.kill(os.getpid(), signal.SIGTERM)  # which jax tells the other hosts
