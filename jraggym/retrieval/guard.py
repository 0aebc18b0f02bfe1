"""Calls that may raise or hang, turned into data."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any


def guarded(call: Callable[[], Any], timeout: float) -> tuple[Any, str | None]:
    """(result, None), or (None, error) when `call` raises or takes more than `timeout` seconds; never raises.

    The call runs in a daemon thread: one that hangs is left behind and keeps neither the caller nor the exit of
    the program waiting.
    """
    box: list[tuple[Any, str | None]] = []
    worker = threading.Thread(target=lambda: box.append(_attempt(call)), daemon=True)
    worker.start()
    worker.join(timeout)
    return box[0] if box else (None, f"no answer within {timeout:g} seconds")


def _attempt(call: Callable[[], Any]) -> tuple[Any, str | None]:
    try:
        return call(), None
    except BaseException as failure:  # a thread has no caller to tell: the failure becomes the turn's error
        return None, f"{type(failure).__name__}: {failure}"
