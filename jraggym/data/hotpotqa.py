"""HotpotQA (Yang et al., EMNLP 2018): two-hop questions with their gold paragraphs.

Two formats: the official json, where each question brings its own paragraphs, and a pooled one, where the
questions share a corpus (`pooled_questions.jsonl` and `pooled_corpus.jsonl` in one folder).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jraggym.data.questions import Item, QuestionSet, check, check_asked, check_texts, gathered, read_json
from jraggym.errors import InputError
from jraggym.retrieval.corpus import Corpus, read_jsonl
from jraggym.types import Document, Example

_POOLED: dict[str, type] = {"id": str, "question": str, "answer": str, "type": str, "level": str, "gold_titles": list}
LAYOUT: dict[str, type] = {
    "_id": str,
    "question": str,
    "answer": str,
    "type": str,
    "supporting_facts": list,
    "context": list,
}


def read_official(path: str | Path) -> QuestionSet:
    """Reads the official json; the corpus is the union of all paragraphs, the first one of each title.

    Raises:
      InputError: naming file and record, for a file that is no such json, a missing field or one of another
        type, or a question without gold answer.
    """
    return read_layout(path, LAYOUT | {"level": str}, "HotpotQA")


def read_layout(path: str | Path, fields: Mapping[str, type], benchmark: str) -> QuestionSet:
    """Reads a json of HotpotQA's layout whose records have `fields`; raises InputError as `read_official` does."""
    records = read_json(path, list, benchmark)
    items = (_item(f"{path}, record {i}", record, fields, benchmark) for i, record in enumerate(records))
    return gathered(items, path)


def _item(where: str, record: Any, fields: Mapping[str, type], benchmark: str) -> Item:
    check(where, record, fields, benchmark)
    # Only the titles: the paragraph is the unit here, and some sentence numbers of the originals are out of range.
    titles = [title for title, _ in _entries(where, record, "supporting_facts", int)]
    documents = []
    for title, sentences in _entries(where, record, "context", list):
        check_texts(where, sentences, "a sentence")
        documents.append(Document(title, title, " ".join(sentence.strip() for sentence in sentences)))
    return _example(where, record["_id"], record, titles), tuple(documents)


def read_pooled(folder: str | Path) -> QuestionSet:
    """Reads `pooled_questions.jsonl` and `pooled_corpus.jsonl`.

    Raises:
      InputError: naming file and line, for a missing file, a missing field or one of another type, a question
        without gold answer, or a gold title that the corpus does not hold.
    """
    corpus = Corpus.from_jsonl(Path(folder) / "pooled_corpus.jsonl")
    path = Path(folder) / "pooled_questions.jsonl"
    examples = []
    for line, record in read_jsonl(path):
        where = f"{path}, line {line}"
        check(where, record, _POOLED, "HotpotQA")
        if absent := [title for title in record["gold_titles"] if not isinstance(title, str) or title not in corpus]:
            raise InputError(f"{where}: gold title outside the corpus", got=absent, remedy="Give the matching corpus.")
        examples.append(_example(where, record["id"], record, record["gold_titles"]))
    if not examples:
        raise InputError(f"{path} holds no question", got="0 lines", remedy="Give at least one question.")
    return QuestionSet(tuple(examples), corpus)


def _entries(where: str, record: dict[str, Any], field: str, kind: type) -> list[tuple[str, Any]]:
    """Checks a list of [title, value] entries."""
    for entry in record[field]:
        good = isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str) and isinstance(entry[1], kind)
        if not good:
            remedy = f"Each entry is a title and a {kind.__name__}."
            raise InputError(f"{where}: wrong entry in {field}", got=repr(entry)[:80], remedy=remedy)
    return [(title, value) for title, value in record[field]]


def _example(where: str, id: str, record: dict[str, Any], titles: list[str]) -> Example:
    check_asked(where, record["question"], record["answer"])
    return Example(id, record["question"], (record["answer"],), record["type"], tuple(dict.fromkeys(titles)))
