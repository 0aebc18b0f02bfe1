"""MuSiQue (Trivedi et al., TACL 2022): questions of two to four hops, composed of single ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jraggym.data.questions import Item, QuestionSet, check, check_asked, check_texts, gathered
from jraggym.errors import InputError
from jraggym.retrieval.corpus import free_id, read_jsonl
from jraggym.types import Document, Example

_FIELDS: dict[str, type] = {
    "id": str,
    "question": str,
    "answer": str,
    "answer_aliases": list,
    "answerable": bool,
    "paragraphs": list,
}
_PARAGRAPH: dict[str, type] = {"title": str, "paragraph_text": str, "is_supporting": bool}


def read_official(path: str | Path) -> QuestionSet:
    """Reads the official jsonl; what is marked as unanswerable is left out and counted in a note.

    A question's kind is the first part of its id, such as "3hop1". The corpus is the union of all paragraphs; two
    different ones of one title get the ids "Paris" and "Paris (2)".

    Raises:
      InputError: naming file and line, for a line that is no such record, a missing field or one of another type, or
        a question without gold answer, and for a file without answerable questions.
    """
    items: list[Item] = []
    ids: dict[tuple[str, str], str] = {}  # of each distinct (title, text)
    taken: set[str] = set()
    left_out = 0
    for line, record in read_jsonl(path):
        where = f"{path}, line {line}"
        check(where, record, _FIELDS, "MuSiQue")
        if not record["answerable"]:
            left_out += 1
            continue
        documents, support = [], []
        for paragraph in record["paragraphs"]:
            check(f"{where}, paragraph", paragraph, _PARAGRAPH, "MuSiQue")
            title, text = paragraph["title"], paragraph["paragraph_text"]
            if (title, text) not in ids:
                ids[title, text] = free_id(title, taken)
            documents.append(Document(ids[title, text], title, text))
            if paragraph["is_supporting"]:
                support.append(ids[title, text])
        items.append((_example(where, record, support), tuple(dict.fromkeys(documents))))
    if not items:
        raise InputError(f"{path} holds no answerable question", got=f"{left_out} others", remedy="Give another file.")
    return gathered(items, path, (f"{left_out} unanswerable questions are left out",) if left_out else ())


def _example(where: str, record: dict[str, Any], support: list[str]) -> Example:
    check_asked(where, record["question"], record["answer"])
    check_texts(where, record["answer_aliases"], "an alias")
    answers = [record["answer"], *(alias for alias in record["answer_aliases"] if alias.strip())]
    kind = record["id"].partition("__")[0]
    unique = (tuple(dict.fromkeys(texts)) for texts in (answers, support))
    return Example(record["id"], record["question"], next(unique), kind, next(unique))
