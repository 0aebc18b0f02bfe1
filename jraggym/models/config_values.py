"""The values of a config.json, each taken once and as what it must be, whatever the file holds.

left = ConfigValues("config.json", json.loads(text))
eps = left.number("rms_norm_eps", 1e-6)
left                                              the keys that nobody took
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from jraggym.errors import InputError

LARGEST = 2**31 - 1  # what an array's dimension can be


class ConfigValues(dict[str, Any]):
    """A JSON object whose keys are taken out of it; a missing key and null give the default.

    Raises InputError, with the key's name, for a value of another kind, and where there is no object at all.
    """

    def __init__(self, name: str, values: Any):
        if not isinstance(values, Mapping):
            raise InputError(f"{name} must be an object", got=repr(values), remedy="Write its keys in {}.")
        super().__init__(values)
        self.name = name

    def number(self, key: str, default: float | None = None) -> Any:
        """A positive float."""
        value = self._take(key, "a positive number", lambda x: _real(x) and 0 < x <= sys.float_info.max)
        return default if value is None else float(value)

    def integer(self, key: str, default: int | None = None, *, least: int = 1, most: int = LARGEST) -> Any:
        """An int from `least` to `most`."""
        kind = f"an integer from {least} to {most}"
        value = self._take(key, kind, lambda x: _real(x) and isinstance(x, int) and least <= x <= most)
        return default if value is None else value

    def flag(self, key: str, default: bool) -> bool:
        value = self._take(key, "true or false", lambda x: isinstance(x, bool))
        return default if value is None else value

    def name_list(self, key: str) -> list[str] | None:
        def fits(x: Any) -> bool:
            return isinstance(x, list | tuple) and all(isinstance(name, str) for name in x)

        return self._take(key, "a list of names", fits)

    def inner(self, key: str) -> ConfigValues:
        """The values of an object in this one; none where it is missing."""
        value = self.pop(key, None)
        return ConfigValues(f"{self.name}: {key}", {} if value is None else value)

    def _take(self, key: str, kind: str, fits: Callable[[Any], bool]) -> Any:
        value = self.pop(key, None)
        if value is None or fits(value):
            return value
        raise InputError(f"{self.name}: {key} must be {kind}", got=repr(value), remedy="Correct the file.")


def _real(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
