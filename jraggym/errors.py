"""The one exception that entries turn into a one-line message and exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


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
