"""From Wikipedia dumps and textbooks in jsonl to a corpus of chunks, streamed: neither side is ever in memory whole.

    path = write_chunks(["wiki-00.jsonl", "wiki-01.jsonl"], "corpora/wiki.jsonl", words=100)
    corpus = Corpus.from_jsonl(path)

    wiki.jsonl                whole: a line {"id": "Paris#3", "title": "Paris", "text": "..."} a chunk
    wiki.jsonl.made           digits that stand for the bytes of the dumps and the settings
    wiki.jsonl.0f3a….part     the same file while it grows; in the name, the digits
    wiki.jsonl.0f3a….sqlite   how far it is, which texts were seen and how many chunks each document has

By the digits a file is never taken for that of other dumps or settings. `python -m train.chunk` is the command.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from jraggym.errors import InputError
from jraggym.preemption import stop_if_asked
from jraggym.retrieval.corpus import json_line
from jraggym.whole import write_whole

COMMIT = 1_000  # documents between two commits: what a kill costs at most
# a full stop before a capital or a digit, perhaps with quotes or brackets between them; or a blank line
_SENTENCE_END = re.compile(r"""(?<=[.!?])["'”’)\]]*\s+(?=["'“‘(\[]*[^\W_a-z])|\n\s*\n""")
_STATE = """
CREATE TABLE IF NOT EXISTS seen (digest BLOB PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS counted (base TEXT PRIMARY KEY, chunks INTEGER) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS place (one INTEGER PRIMARY KEY, source INTEGER, line INTEGER, offset INTEGER, size INTEGER);
"""


def chunks(text: str, words: int, overlap: int) -> Iterator[str]:
    """Cuts a text at sentence ends into chunks of at most `words` words.

    A chunk begins with the last whole sentences of the one before, as many as have at most `overlap` words together
    and leave room for the next one. A sentence longer than `words` is cut into pieces, which count as sentences.
    White space becomes single spaces.
    """
    held: list[list[str]] = []  # the sentences of the chunk in work, as words
    fresh = False  # it holds more than the overlap
    for sentence in _pieces(text, words):
        if _size(held) + len(sentence) > words:
            if fresh:
                yield " ".join(word for part in held for word in part)
            while held and (_size(held) > overlap or _size(held) + len(sentence) > words):
                del held[0]
        held.append(sentence)
        fresh = True
    if fresh:
        yield " ".join(word for part in held for word in part)


def _size(sentences: list[list[str]]) -> int:
    return sum(map(len, sentences))


def _pieces(text: str, words: int) -> Iterator[list[str]]:
    """The sentences of a text as lists of at most `words` words."""
    start = 0
    for end in [*(match.end() for match in _SENTENCE_END.finditer(text)), len(text)]:
        sentence = text[start:end].split()
        yield from (sentence[i : i + words] for i in range(0, len(sentence), words))
        start = end


def write_chunks(
    sources: Sequence[str | Path],
    path: str | Path,
    *,
    words: int = 100,
    overlap: int = 20,
    field: str = "text",
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Writes the chunks of all documents of `sources` into the jsonl file `path`, once, and gives that path.

    A line of a source is an object with texts `title`, `field` and perhaps `id`; others, such as a url, are passed
    over. The n-th chunk of a document has the id "title#n", or "id#n" where it has one; documents of one title are
    counted through. A chunk whose text was there before is left out, but counted. A killed call goes on where it was
    when called again, to the same bytes. One job writes at a time. `progress` is told the number of lines read of the
    source in work, after each commit.

    Raises:
      InputError: when there is no source, `words` is below 1, `overlap` is not below it, the file cannot be written or
        is there with other contents, no chunk comes out, or, naming file and line, for a line that is no such document.
    """
    if not sources or not 0 <= overlap < words:
        got = f"{len(sources)} sources, words={words}, overlap={overlap}"
        raise InputError("chunks need a source, and an overlap below their words", got=got, remedy="Give these.")
    paths = [Path(source) for source in sources]
    final, digits = Path(path), _fingerprint(paths, words, overlap, field)
    made, part, state = (final.with_name(final.name + end) for end in (".made", f".{digits}.part", f".{digits}.sqlite"))
    try:
        if final.exists():
            if made.exists() and made.read_text() == digits:
                return final
            remedy = "Name another file, or remove that one."
            raise InputError(f"{final} holds something else", got="other sources or settings", remedy=remedy)
        final.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(state)) as database, part.open("ab") as out:
            database.executescript(_STATE)
            _Writer(paths, database, out, words, overlap, field, progress).run()
        if not part.stat().st_size:
            raise InputError("no text to cut", got=f"{len(paths)} files without any", remedy="Give documents.")
        write_whole(made, digits)
        os.replace(part, final)
        state.unlink()
    except (OSError, sqlite3.Error) as error:
        remedy = "Name a file in a folder with room, and remove a damaged one."
        raise InputError(f"cannot write chunks into {final}", got=error, remedy=remedy) from error
    return final


class _Writer:
    """Goes on from the last commit: the part file and the database agree there, and what is behind it is cut off."""

    def __init__(
        self,
        paths: list[Path],
        database: sqlite3.Connection,
        out: Any,
        words: int,
        overlap: int,
        field: str,
        progress: Callable[[int], None] | None,
    ):
        self._paths, self._database, self._out = paths, database, out
        self._words, self._overlap, self._field, self._progress = words, overlap, field, progress

    def run(self) -> None:
        place = self._database.execute("SELECT source, line, offset, size FROM place").fetchone()
        source, line, offset, size = place or (0, 0, 0, 0)
        if self._out.seek(0, os.SEEK_END) < size:
            got, remedy = f"less than {size} bytes", "Remove it with its .sqlite, and it is written again."
            raise InputError(f"{self._out.name} is damaged", got=got, remedy=remedy)
        self._out.truncate(size)
        for number in range(source, len(self._paths)):
            self._read(number, line, offset)
            line = offset = 0

    def _read(self, source: int, line: int, offset: int) -> None:
        path = self._paths[source]
        with path.open("rb") as file:
            file.seek(offset)
            for content in iter(file.readline, b""):
                line += 1
                if content.strip():
                    self._write(*_document(path, line, content, self._field))
                if line % COMMIT == 0:
                    self._commit(source, line, file.tell())
            self._commit(source + 1, 0, 0)
        if self._progress is not None:
            self._progress(line)

    def _write(self, base: str, title: str, text: str) -> None:
        run = self._database.execute
        count = (run("SELECT chunks FROM counted WHERE base = ?", (base,)).fetchone() or (0,))[0]
        for chunk in chunks(text, self._words, self._overlap):
            count += 1
            digest = hashlib.sha256(chunk.encode()).digest()[:16]
            if run("INSERT OR IGNORE INTO seen VALUES (?)", (digest,)).rowcount:
                row = {"id": f"{base}#{count}", "title": title, "text": chunk}
                self._out.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        run("INSERT OR REPLACE INTO counted VALUES (?, ?)", (base, count))

    def _commit(self, source: int, line: int, offset: int) -> None:
        """The chunks first: bytes behind the committed size are only cut off."""
        self._out.flush()
        os.fsync(self._out.fileno())
        place = (source, line, offset, self._out.tell())
        self._database.execute("INSERT OR REPLACE INTO place VALUES (0, ?, ?, ?, ?)", place)
        self._database.commit()
        if self._progress is not None and line:
            self._progress(line)
        stop_if_asked()


def _document(path: Path, line: int, content: bytes, field: str) -> tuple[str, str, str]:
    """What its chunks' ids begin with, title and text of a line."""
    try:
        row = json_line(path, line, content.decode())
    except UnicodeDecodeError as error:
        raise InputError(f"{path}, line {line} is no UTF-8", got=error, remedy="Write UTF-8.") from error
    remedy = f"A document has text fields title, {field} and an optional id; --text-field names another one."
    if missing := [name for name in ("title", field) if name not in row]:
        raise InputError(f"{path}, line {line}: missing field", got=", ".join(missing), remedy=remedy)
    texts = (row.get("id", row["title"]), row["title"], row[field])
    if not all(isinstance(text, str) for text in texts):
        got = ", ".join(type(text).__name__ for text in texts)
        raise InputError(f"{path}, line {line}: field is no text", got=got, remedy=remedy)
    return texts


def _fingerprint(paths: list[Path], words: int, overlap: int, field: str) -> str:
    """Sixteen hex digits that tell the sources and settings from others."""
    other = "" if field == "text" else f" {field}"
    digest = hashlib.sha256(f"1 {words} {overlap}{other}".encode())  # 1: the form of chunks that this module writes
    for path in paths:
        try:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise InputError(f"cannot read {path}", got=error, remedy="Give the path of a jsonl file.") from error
    return digest.hexdigest()[:16]
