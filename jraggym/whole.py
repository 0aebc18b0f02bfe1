"""Files and folders that are there whole or not at all."""

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
    folder = Path(folder).absolute()
    if not folder.name or folder.is_file():
        raise InputError("no folder can be written here", got=str(folder), remedy="Name another one.")
    building, old = (folder.with_name(f".{folder.name}.{state}") for state in ("building", "old"))
    try:
        if old.exists() and not folder.exists():  # killed between the two renames below
            os.replace(old, folder)
        for left in (building, old):
            shutil.rmtree(left, ignore_errors=True)
        building.mkdir(parents=True)
        try:
            yield building
        except BaseException:
            shutil.rmtree(building, ignore_errors=True)
            raise
        if folder.exists():
            os.replace(folder, old)
        os.replace(building, folder)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise InputError(f"cannot write {folder}", got=error, remedy="Name another folder.") from error


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file in one move, in place of an earlier one; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(path.name + ".tmp")
    scratch.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(scratch, path)
