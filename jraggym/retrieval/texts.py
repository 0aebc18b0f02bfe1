"""The documents of a corpus on disk, read one at a time: for corpora that no host wants in its memory.

One ArrayRecord file of JSON lists [id, title, text]; record i is the document at position i. Any number of processes
may read it at once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter

from jraggym.errors import InputError
from jraggym.types import Document


def write_texts(path: str | Path, documents: Iterable[Document]) -> Texts:
    """Writes the documents in their order, in one move, in place of an earlier file, and opens them.

    Raises InputError when there is no document, or the file cannot be written.
    """
    path, count = Path(path), 0
    scratch = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        writer = ArrayRecordWriter(str(scratch), "group_size:1")  # a document is read without its neighbours
        try:
            for count, document in enumerate(documents, 1):  # noqa: B007
                writer.write(json.dumps([document.id, document.title, document.text]).encode())
        finally:
            writer.close()
        if count:
            os.replace(scratch, path)
    except (OSError, RuntimeError) as error:
        raise InputError(f"cannot write {path}", got=error, remedy="Give a folder with room.") from error
    if not count:
        raise InputError("there is no document to write", got="0 documents", remedy="Give at least one.")
    return Texts(path)


class Texts:
    """The documents of a file of `write_texts`, by position."""

    def __init__(self, path: str | Path):
        """Raises InputError when there is no such file, or it is damaged."""
        try:
            self._source = ArrayRecordDataSource([str(path)])
            self._path, self._size = Path(path), len(self._source)
        except Exception as error:  # what a damaged file raises depends on the byte
            raise InputError(f"cannot read {path}", got=error, remedy="Write it again with write_texts.") from error

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, position: int) -> Document:
        """The document at a position; IndexError beyond the end, InputError when it is damaged."""
        if not 0 <= position < self._size:
            raise IndexError(f"document {position} of {self._size} in {self._path}")
        try:
            return Document(*json.loads(self._source[position]))
        except Exception as error:
            raise InputError(
                f"{self._path} is damaged", got=error, remedy="Write it again with write_texts."
            ) from error
