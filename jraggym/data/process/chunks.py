"""Collecting in chunks: a kill at any moment loses at most the chunk in work, and repeats no question.

directory/chunk-000000.jsonl    one header line, then one record a line
directory/chunk-000001.jsonl
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jraggym.data.process.record import ProcessRecord, decode, encode
from jraggym.errors import InputError

_NAME = re.compile(r"chunk-(\d{6,})\.jsonl")
_HEADER = {"chunk", "settings", "questions", "records", "bytes", "sha256"}


@dataclass(frozen=True)
class ChunkStore:
    """Finished chunks of one collecting run, each written whole or not at all.

    `settings` is the run's fingerprint in plain JSON values: everything that decides what chunk i holds
    (questions, chunk size, models, retriever, seed). When a chunk is a function of `settings` and its
    index, a killed and resumed run equals an uninterrupted one byte for byte.

    Raises:
        InputError: the directory cannot be made, or holds a damaged chunk or one of other settings.
    """

    directory: str | Path
    settings: Mapping[str, Any]

    def __post_init__(self) -> None:
        object.__setattr__(self, "settings", json.loads(json.dumps(dict(self.settings))))
        try:
            Path(self.directory).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"no folder can be made at {self.directory}", got=error, remedy="Name another.") from error
        for index in self.done():
            self._check(index, self._header(index)["settings"])

    def done(self) -> set[int]:
        """The indices of the finished chunks."""
        names = (_NAME.fullmatch(path.name) for path in Path(self.directory).iterdir())
        return {int(match[1]) for match in names if match}

    def write(self, index: int, questions: Sequence[str], records: Sequence[ProcessRecord]) -> None:
        """Adds chunk `index`: the ids of its questions, with or without records, and their records in order.

        Raises:
            InputError: the chunk is already there, a record belongs to no question of it, or it cannot be written.
        """
        path = self._path(index)
        if path.exists():
            raise InputError(f"chunk {index} is already in {self.directory}", got=path.name, remedy="Use `done()`.")
        if foreign := sorted({record.example_id for record in records} - set(questions)):
            raise InputError(f"records of questions outside chunk {index}", got=foreign, remedy="Name all questions.")
        body = b"".join(encode(record) + b"\n" for record in records)
        header = {
            "chunk": index,
            "settings": self.settings,
            "questions": list(questions),
            "records": len(records),
            "bytes": len(body),
        }
        sealed = {**header, "sha256": _digest(header, body)}
        _write_atomically(path, json.dumps(sealed, sort_keys=True).encode() + b"\n" + body)

    def read_all(self, chunks: int | None = None) -> Iterator[ProcessRecord]:
        """All records in chunk order.

        Args:
            chunks: how many chunks the run has; None: those up to the highest one that is there.

        Raises:
            InputError: a chunk is missing, too many or damaged, or a question is in two chunks.
        """
        done = self.done()
        count = max(done, default=-1) + 1 if chunks is None else chunks
        if wrong := sorted(set(range(count)) ^ done):
            raise InputError(
                f"{self.directory} holds other chunks than 0 to {count - 1}",
                got=f"a difference in {wrong[:10]}",
                remedy="Finish collecting.",
            )
        seen: dict[str, int] = {}
        for index in range(count):
            for question in self._header(index)["questions"]:
                if question in seen:
                    raise InputError(
                        f"question {question!r} is in two chunks of {self.directory}",
                        got=f"{seen[question]} and {index}",
                        remedy="Collect with distinct question ids into an empty folder.",
                    )
                seen[question] = index
            yield from self._records(index)

    def _path(self, index: int) -> Path:
        return Path(self.directory) / f"chunk-{index:06d}.jsonl"

    def _header(self, index: int) -> dict[str, Any]:
        """The first line, after a check of the file's length against it."""
        path = self._path(index)
        with path.open("rb") as file:
            line = file.readline()
        try:
            header = json.loads(line)
        except ValueError as error:
            raise _damaged(path, f"no header line ({error})") from error
        if not isinstance(header, dict) or set(header) != _HEADER or header["chunk"] != index:
            raise _damaged(path, "another header line")
        if path.stat().st_size != len(line) + header["bytes"]:
            raise _damaged(path, f"{path.stat().st_size} bytes, not {len(line) + header['bytes']}")
        return header

    def _records(self, index: int) -> Iterator[ProcessRecord]:
        path, header = self._path(index), self._header(index)
        self._check(index, header["settings"])
        body = path.read_bytes().partition(b"\n")[2]
        if _digest(header, body) != header["sha256"]:
            raise _damaged(path, "a wrong checksum")
        yield from (decode(line) for line in body.split(b"\n")[:-1])

    def _check(self, index: int, found: Mapping[str, Any]) -> None:
        names = sorted(
            n for n in {*found, *self.settings} if found.get(n, "nothing") != self.settings.get(n, "nothing")
        )
        if names:
            sides = (f"{n}: {found.get(n, 'nothing')!r} there, {self.settings.get(n, 'nothing')!r} here" for n in names)
            raise InputError(
                f"{self._path(index)} was collected with other settings",
                got="; ".join(sides),
                remedy="Collect with the settings there, or into another folder.",
            )


def _digest(header: Mapping[str, Any], body: bytes) -> str:
    rest = {name: value for name, value in header.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode() + b"\n" + body).hexdigest()


def _damaged(path: Path, got: str) -> InputError:
    return InputError(
        f"chunk file {path} is damaged", got=got, remedy="Remove this file and collect again: only it is redone."
    )


def _write_atomically(path: Path, content: bytes) -> None:
    """Under its name there is nothing or the whole file, also after a power failure."""
    temporary = path.with_name(f".{path.name}.tmp")  # one name a chunk: what a kill leaves is used again
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise InputError(f"cannot write {path}", got=error, remedy="Make room there or name another folder.") from error
