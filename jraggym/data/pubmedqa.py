"""PubMedQA (Jin et al., EMNLP 2019): yes/no/maybe questions, each with the abstract that answers it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jraggym.data.questions import Item, QuestionSet, check, check_asked, check_texts, gathered, read_json
from jraggym.errors import InputError
from jraggym.types import Document, Example

_FIELDS: dict[str, type] = {"QUESTION": str, "CONTEXTS": list, "LABELS": list, "final_decision": str}
_DECISIONS = ("yes", "no", "maybe")


def read_official(path: str | Path) -> QuestionSet:
    """Reads `ori_pqal.json`, the labelled questions by PubMed id; each one's abstract is its gold document.

    The abstract comes without its conclusion, which is the answer in other words, and without the article's title,
    which is the question: a document's title is "PubMed 10808977". Options are yes, no and maybe.

    Raises:
      InputError: naming file and record, for a file that is no such json, a missing field or one of another type, a
        blank question, or a decision other than yes, no and maybe.
    """
    records = read_json(path, dict, "PubMedQA")
    return gathered((_item(f"{path}, record {id}", id, record) for id, record in records.items()), path)


def _item(where: str, id: str, record: Any) -> Item:
    check(where, record, _FIELDS, "PubMedQA")
    check_asked(where, record["QUESTION"], record["final_decision"])
    if record["final_decision"] not in _DECISIONS:
        remedy = f"Use one of {', '.join(_DECISIONS)}."
        raise InputError(f"{where}: unknown final_decision", got=repr(record["final_decision"]), remedy=remedy)
    labels, contexts = record["LABELS"], record["CONTEXTS"]
    check_texts(where, [*labels, *contexts], "a label or context")
    if len(labels) != len(contexts) or not contexts:
        got = f"{len(contexts)} contexts, {len(labels)} labels"
        raise InputError(f"{where}: each context needs its label", got=got, remedy="Give PubMedQA questions.")
    text = " ".join(f"{label}: {context.strip()}" for label, context in zip(labels, contexts, strict=True))
    options = tuple((decision, decision) for decision in _DECISIONS)
    example = Example(id, record["QUESTION"], (record["final_decision"],), support=(id,), options=options)
    return example, (Document(id, f"PubMed {id}", text),)
