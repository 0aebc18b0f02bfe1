"""Rate limits: how long each piece of work waits for its turn."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from jraggym.errors import InputError


class Pace:
    """Spaces work out evenly: any minute sees at most `limit` units, and one piece of work more.

    Nothing is saved up in quiet times, so that no burst follows them.
    """

    def __init__(self, limit: float, clock: Callable[[], float] = time.monotonic):
        """`limit`: units a minute, may be infinite; `clock`: seconds. Raises InputError unless it is positive."""
        if not limit > 0:
            raise InputError("a rate limit must be positive", got=limit, remedy="Leave it out to have none.")
        self._seconds, self._clock = 60.0 / limit, clock
        self._free, self._lock = clock(), threading.Lock()

    def take(self, amount: float) -> float:
        """Reserves `amount` units, and returns the seconds to wait before they may be used."""
        with self._lock:
            now = self._clock()
            start = max(now, self._free)
            self._free = start + amount * self._seconds
            return start - now

    def give_back(self, amount: float) -> None:
        """Returns units that were reserved but not used; a negative amount was used beyond what was reserved."""
        with self._lock:
            self._free -= amount * self._seconds

    def hold(self, seconds: float) -> None:
        """Lets nothing more begin for so many seconds."""
        with self._lock:
            self._free = max(self._free, self._clock() + seconds)
