"""What a server has answered, on disk: a question that was paid for is never paid for again."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Any

from jraggym.errors import InputError


class AnswerCache:
    """A table in one SQLite file from a question (JSON values) to the text of its answer.

    Each answer is on disk before `put` returns, and several processes may share the file. Without a path nothing is
    kept. To be used as a context, from any thread.
    """

    def __init__(self, path: Path | None):
        self._path, self._lock = path, threading.Lock()
        self._table: sqlite3.Connection | None = None

    def __enter__(self) -> AnswerCache:
        """Raises InputError when the file cannot be used."""
        if self._path is not None:
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._table = sqlite3.connect(self._path, timeout=60.0, check_same_thread=False)
                with self._table:
                    self._table.execute("CREATE TABLE IF NOT EXISTS answers (question TEXT PRIMARY KEY, answer TEXT)")
            except (OSError, sqlite3.Error) as error:
                self.__exit__(None, None, None)
                remedy = "Name a new file, or one that was written here before."
                raise InputError(f"cannot keep answers in {self._path}", got=error, remedy=remedy) from error
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._table is not None:
            self._table.close()
            self._table = None

    def get(self, question: Mapping[str, Any]) -> str | None:
        """The answer to a question, if there is one."""
        if self._table is None:
            return None
        with self._lock, closing(self._table.cursor()) as cursor:
            found = cursor.execute("SELECT answer FROM answers WHERE question = ?", (_digest(question),)).fetchone()
        return None if found is None else found[0]

    def put(self, question: Mapping[str, Any], answer: str) -> None:
        """Keeps an answer, in place of an earlier one."""
        if self._table is not None:
            with self._lock, self._table:
                self._table.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (_digest(question), answer))


def _digest(question: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()
