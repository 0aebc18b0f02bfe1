"""Bamboogle (Press et al., EMNLP Findings 2023): 125 two-hop questions without paragraphs."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jraggym.data.questions import QuestionSet, check, check_asked, gathered, read_json
from jraggym.errors import InputError
from jraggym.types import Example

_FIELDS: dict[str, type] = {"Question": str, "Answer": str}


def read_official(path: str | Path) -> QuestionSet:
    """Reads the official csv with columns Question and Answer, or a json list of such objects; there is no corpus.

    Ids are "bamboogle-1" and so on, by position.

    Raises:
      InputError: naming file and record, for a file that is no such csv or json, a missing or blank field.
    """
    records = read_json(path, list, "Bamboogle") if Path(path).suffix == ".json" else _rows(Path(path))
    examples = []
    for number, record in enumerate(records, start=1):
        where = f"{path}, question {number}"
        check(where, record, _FIELDS, "Bamboogle")
        check_asked(where, record["Question"], record["Answer"])
        examples.append(Example(f"bamboogle-{number}", record["Question"], (record["Answer"],)))
    if not examples:
        raise InputError(f"{path} holds no question", got="0 rows", remedy="Give the official Bamboogle csv.")
    return gathered(((example, ()) for example in examples), path)


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:  # spreadsheets write a byte-order mark
            yield from csv.DictReader(file, strict=True)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"cannot read {path}", got=error, remedy="Give the official Bamboogle csv.") from error
