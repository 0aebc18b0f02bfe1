"""One stopwatch for the process: how long it was busy with what, wherever in the code that happens.

with spent("retrieval"):      from any thread; kinds may lie within one another, and each counts whole
    ...
seconds = take()              {"retrieval": 0.25}, and everything begins at 0 again
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

_seconds: defaultdict[str, float] = defaultdict(float)
_guard = threading.Lock()


@contextmanager
def spent(kind: str) -> Iterator[None]:
    """Adds the time of its block to `kind`."""
    start = time.perf_counter()
    try:
        yield
    finally:
        with _guard:
            _seconds[kind] += time.perf_counter() - start


def take() -> dict[str, float]:
    """The seconds of each kind since the last call."""
    with _guard:
        found = dict(_seconds)
        _seconds.clear()
    return found
