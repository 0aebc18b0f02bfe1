"""Folders that are there whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jraggym.errors import InputError


@contextmanager
def whole_folder(folder: str | Path) -> Iterator[Path]:
    """Gives a hidden folder to fill, which takes the place of `folder` at the end: a kill leaves no half of it.

    Raises InputError when the folder cannot be written.
    """
    folder = Path(folder)
    building, old = (folder.with_name(f".{folder.name}.{state}") for state in ("building", "old"))
    try:
        for left in (building, old):
            shutil.rmtree(left, ignore_errors=True)
        building.mkdir(parents=True)
        yield building
        if folder.exists():
            os.replace(folder, old)
        os.replace(building, folder)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise InputError(f"cannot write {folder}", got=error, remedy="Name another folder.") from error
