"""The one exception that entries turn into a one-line message and exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

# Exit codes, of sysexits.h; that of an InputError is 2.
LOST = 69  # EX_UNAVAILABLE: the job is over, since another of its processes is gone
PREEMPTED = 75  # EX_TEMPFAIL: what was done is saved, run the same command again


class InputError(ValueError):
    """Bad input from outside (a file, a field, a flag): says what, what was got, and what to do."""

    def __init__(self, what: str, *, got: object, remedy: str):
        super().__init__(f"{what}; got {got}. {remedy}")


@contextmanager
def exit_on_input_error() -> Iterator[None]:
    """Turns an `InputError` inside the block into `error: ...` on stderr and exit code 2."""
    try:
        yield
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from error
