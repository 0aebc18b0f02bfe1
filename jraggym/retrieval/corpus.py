"""The documents that a retriever searches, in a fixed order: a corpus position is an index into them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jraggym.errors import InputError
from jraggym.types import Document

FIELDS = ("id", "title", "text")
_WORD = re.compile(r"\w+")


def words(text: str) -> list[str]:
    """Splits a text into lower-cased `\\w+` words, the tokens of BM25 and of TF-IDF."""
    return _WORD.findall(text.lower())


def written(text: str | Document) -> str:
    """A document as one text: title and text; a text as it is."""
    return f"{text.title}. {text.text}" if isinstance(text, Document) else text


@dataclass(frozen=True)
class Corpus:
    """Documents with distinct ids; build one with `from_documents` or `from_jsonl`."""

    documents: tuple[Document, ...]
    _positions: dict[str, int] = field(repr=False, compare=False)

    @classmethod
    def from_documents(cls, documents: Iterable[Document]) -> Corpus:
        """Keeps the documents in the given order.

        Raises:
          InputError: when there is no document, or two have the same id.
        """
        return cls._build(((document, "the documents") for document in documents), "the documents")

    @classmethod
    def from_jsonl(cls, path: str | Path) -> Corpus:
        """Reads one JSON object per line with `title`, `text` and an optional `id`.

        The default id is the title; a title that is already an id gets a number: "Paris", "Paris (2)".

        Raises:
          InputError: naming file and line, for a missing or empty file, a line that is no JSON object, a
            missing, unknown or non-text field, or an id that was there before.
        """
        rows = [(line, _fields(path, line, value)) for line, value in read_jsonl(path)]
        taken = {row["id"] for _, row in rows if "id" in row}
        return cls._build(((_document(row, taken), f"{path}, line {line}") for line, row in rows), str(path))

    @classmethod
    def _build(cls, sources: Iterable[tuple[Document, str]], whole: str) -> Corpus:
        documents: list[Document] = []
        positions: dict[str, int] = {}
        for document, where in sources:
            if document.id in positions:
                raise InputError(f"{where}: duplicate document id", got=repr(document.id), remedy="Make ids distinct.")
            positions[document.id] = len(documents)
            documents.append(document)
        if not documents:
            raise InputError(f"{whole}: the corpus is empty", got="0 documents", remedy="Give at least one document.")
        return cls(tuple(documents), positions)

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, position: int) -> Document:
        return self.documents[position]

    def __contains__(self, id: str) -> bool:
        return id in self._positions

    def position(self, id: str) -> int:
        """Gives the position of the document with this id; raises InputError when there is none."""
        if id not in self._positions:
            raise InputError(
                "no such document in the corpus", got=repr(id), remedy="Use the id of one of its documents."
            )
        return self._positions[id]

    def texts(self) -> list[str]:
        """Gives what is indexed for each document: title and text."""
        return [written(document) for document in self.documents]


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line number from 1, object) for each non-blank line, one at a time.

    Raises InputError naming file and line.
    """
    try:
        with Path(path).open(encoding="utf-8", newline="\n") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, json_line(path, number, line)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}", got=error, remedy="Give the path of a UTF-8 jsonl file.") from error


def json_line(path: str | Path, number: int, line: str) -> dict[str, Any]:
    """The object in a line of a jsonl file; raises InputError naming file and line."""
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}, line {number} is not JSON", got=error, remedy="Write one object per line."
        ) from error
    if not isinstance(value, dict):
        got = type(value).__name__
        raise InputError(f"{path}, line {number} is no JSON object", got=got, remedy="Write one object per line.")
    return value


def _fields(path: str | Path, line: int, row: dict[str, Any]) -> dict[str, str]:
    where, remedy = f"{path}, line {line}", "A document has text fields title, text and an optional id."
    if unknown := sorted(set(row) - set(FIELDS)):
        raise InputError(f"{where}: unknown field", got=", ".join(unknown), remedy=remedy)
    if missing := [name for name in FIELDS[1:] if name not in row]:
        raise InputError(f"{where}: missing field", got=", ".join(missing), remedy=remedy)
    if wrong := [name for name, value in row.items() if not isinstance(value, str)]:
        raise InputError(f"{where}: field is no text", got=", ".join(wrong), remedy=remedy)
    return row


def _document(row: dict[str, str], taken: set[str]) -> Document:
    """Builds one document; `taken` holds every id written in the file and every default given so far."""
    if "id" in row:
        return Document(row["id"], row["title"], row["text"])
    return Document(free_id(row["title"], taken), row["title"], row["text"])


def free_id(title: str, taken: set[str]) -> str:
    """An id for a document of this title, which is added to `taken`: "Paris", then "Paris (2)"."""
    id, number = title, 1
    while id in taken:
        number += 1
        id = f"{title} ({number})"
    taken.add(id)
    return id
