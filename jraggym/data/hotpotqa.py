"""HotpotQA (Yang et al., EMNLP 2018): two-hop questions with their gold paragraphs.

Two formats: the official json, where each question brings its own paragraphs, and a pooled one, where the
questions share a corpus (`pooled_questions.jsonl` and `pooled_corpus.jsonl` in one folder).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jraggym.errors import InputError
from jraggym.retrieval.corpus import Corpus, read_jsonl
from jraggym.types import Document, Example

_POOLED: dict[str, type] = {"id": str, "question": str, "answer": str, "type": str, "level": str, "gold_titles": list}
_OFFICIAL: dict[str, type] = {
    "_id": str,
    "question": str,
    "answer": str,
    "type": str,
    "level": str,
    "supporting_facts": list,
    "context": list,
}


class QuestionSet(NamedTuple):
    """Questions and the corpus that they are asked over; `support` of an example holds corpus ids.

    `brought` are the ids of the paragraphs, gold ones and distractors, that each question brings in the official json.
    """

    examples: tuple[Example, ...]
    corpus: Corpus
    brought: Mapping[str, tuple[str, ...]] = {}


def read_official(path: str | Path) -> QuestionSet:
    """Reads the official json; the corpus is the union of all paragraphs, the first one of each title.

    Raises:
      InputError: naming file and record, for a file that is no such json, a missing field or one of another
        type, or a question without gold answer.
    """
    try:
        records = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}", got=error, remedy="Give the official HotpotQA json.") from error
    if not isinstance(records, list) or not records:
        raise InputError(
            f"{path} is no list of questions", got=type(records).__name__, remedy="Give the official json."
        )
    examples: list[Example] = []
    paragraphs: dict[str, Document] = {}
    brought: dict[str, tuple[str, ...]] = {}
    for number, record in enumerate(records):
        where = f"{path}, record {number}"
        _check(where, record, _OFFICIAL)
        titles = [title for title, _ in _pairs(where, record, "supporting_facts", int)]
        examples.append(_example(where, record["_id"], record, titles))
        context = _pairs(where, record, "context", list)
        brought[record["_id"]] = tuple(title for title, _ in context)
        for title, sentences in context:
            paragraphs.setdefault(title, Document(title, title, _join(where, sentences)))
    return QuestionSet(tuple(examples), Corpus.from_documents(paragraphs.values()), brought)


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
        _check(where, record, _POOLED)
        if absent := [title for title in record["gold_titles"] if not isinstance(title, str) or title not in corpus]:
            raise InputError(f"{where}: gold title outside the corpus", got=absent, remedy="Give the matching corpus.")
        examples.append(_example(where, record["id"], record, record["gold_titles"]))
    if not examples:
        raise InputError(f"{path} holds no question", got="0 lines", remedy="Give at least one question.")
    return QuestionSet(tuple(examples), corpus)


def _check(where: str, record: Any, fields: dict[str, type]) -> None:
    if not isinstance(record, dict):
        raise InputError(f"{where} is no JSON object", got=type(record).__name__, remedy="Give HotpotQA questions.")
    if missing := [name for name in fields if name not in record]:
        raise InputError(
            f"{where}: missing field", got=", ".join(missing), remedy="Give HotpotQA questions with answers."
        )
    if wrong := [name for name, kind in fields.items() if not isinstance(record[name], kind)]:
        got = ", ".join(f"{name}: {type(record[name]).__name__}" for name in wrong)
        raise InputError(f"{where}: field of the wrong type", got=got, remedy="Give HotpotQA questions.")


def _pairs(where: str, record: dict[str, Any], field: str, kind: type) -> list[tuple[str, Any]]:
    """Checks a list of [title, value] pairs."""
    for pair in record[field]:
        good = isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) and isinstance(pair[1], kind)
        if not good:
            remedy = f"Each entry is a title and a {kind.__name__}."
            raise InputError(f"{where}: wrong entry in {field}", got=repr(pair)[:80], remedy=remedy)
    return [(title, value) for title, value in record[field]]


def _join(where: str, sentences: Sequence[Any]) -> str:
    if not all(isinstance(sentence, str) for sentence in sentences):
        raise InputError(f"{where}: a sentence is no text", got=repr(sentences)[:80], remedy="Give a list of texts.")
    return " ".join(sentence.strip() for sentence in sentences)


def _example(where: str, id: str, record: dict[str, Any], titles: list[str]) -> Example:
    if not record["answer"].strip():
        raise InputError(f"{where}: no gold answer", got=repr(record["answer"]), remedy="Give questions with answers.")
    if not record["question"].strip():
        raise InputError(f"{where}: no question", got=repr(record["question"]), remedy="Give it a text.")
    return Example(id, record["question"], (record["answer"],), record["type"], tuple(dict.fromkeys(titles)))
