"""What every reader of a question file gives, and the checks that the readers share."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jraggym.errors import InputError
from jraggym.retrieval.corpus import Corpus
from jraggym.types import Document, Example

Item = tuple[Example, tuple[Document, ...]]  # a question and the paragraphs that it brings
NO_CORPUS = Corpus((), {})  # of questions that bring none; `QuestionSet.over` gives them one


class QuestionSet(NamedTuple):
    """Questions and the corpus that they are asked over; `support` of an example holds corpus ids.

    `brought` are the ids of the paragraphs, gold ones and distractors, that each question brings in its official file.
    `notes` say what was left out or is fewer than asked for, a sentence each.
    """

    examples: tuple[Example, ...]
    corpus: Corpus
    brought: Mapping[str, tuple[str, ...]] = {}
    notes: tuple[str, ...] = ()

    def items(self) -> Iterator[Item]:
        """Each question with the paragraphs that it brings."""
        for example in self.examples:
            ids = self.brought.get(example.id, ())
            yield example, tuple(self.corpus[self.corpus.position(id)] for id in ids)

    def over(self, corpus: Corpus) -> QuestionSet:
        """The same questions over another corpus; gold documents that it does not hold are dropped, with a note."""
        kept = tuple(
            dataclasses.replace(example, support=tuple(id for id in example.support if id in corpus))
            for example in self.examples
        )
        lost = sum(len(old.support) > len(new.support) for old, new in zip(self.examples, kept, strict=True))
        notes = (*self.notes, f"{lost} questions have gold documents outside the corpus") if lost else self.notes
        return QuestionSet(kept, corpus, notes=notes)


def gathered(items: Iterable[Item], source: object, notes: tuple[str, ...] = ()) -> QuestionSet:
    """The question set of these items; its corpus is the union of all paragraphs, the first one of each id.

    Raises InputError, naming the `source` that they come from, when two questions have the same id.
    """
    examples: dict[str, Example] = {}
    paragraphs: dict[str, Document] = {}
    brought: dict[str, tuple[str, ...]] = {}
    for example, documents in items:
        if example.id in examples:
            raise InputError(
                f"{source}: two questions have the same id", got=repr(example.id), remedy="Make ids distinct."
            )
        examples[example.id] = example
        if documents:
            brought[example.id] = tuple(document.id for document in documents)
        for document in documents:
            paragraphs.setdefault(document.id, document)
    corpus = Corpus.from_documents(paragraphs.values()) if paragraphs else NO_CORPUS
    return QuestionSet(tuple(examples.values()), corpus, brought, notes)


def read_json(path: str | Path, kind: type[list] | type[dict], benchmark: str) -> Any:
    """A json file that holds a list, or an object, of questions; raises InputError naming the file otherwise."""
    remedy = f"Give the official {benchmark} json."
    try:
        records = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}", got=error, remedy=remedy) from error
    if not isinstance(records, kind) or not records:
        raise InputError(f"{path} is no {_NAMES[kind]} of questions", got=type(records).__name__, remedy=remedy)
    return records


_NAMES: dict[type, str] = {list: "list", dict: "object"}


def check(where: str, record: Any, fields: Mapping[str, type], benchmark: str) -> None:
    """Refuses a record, by an InputError that names it, unless it has these fields of these types."""
    remedy = f"Give {benchmark} questions with answers."
    if not isinstance(record, dict):
        raise InputError(f"{where} is no JSON object", got=type(record).__name__, remedy=remedy)
    if missing := [name for name in fields if name not in record]:
        raise InputError(f"{where}: missing field", got=", ".join(missing), remedy=remedy)
    if wrong := [name for name, kind in fields.items() if not isinstance(record[name], kind)]:
        got = ", ".join(f"{name}: {type(record[name]).__name__}" for name in wrong)
        raise InputError(f"{where}: field of the wrong type", got=got, remedy=remedy)


def check_texts(where: str, values: Iterable[Any], what: str) -> None:
    """Refuses values of which one is no text, by an InputError that names the record."""
    if wrong := [value for value in values if not isinstance(value, str)]:
        raise InputError(f"{where}: {what} is no text", got=repr(wrong[0])[:80], remedy="Give a list of texts.")


def check_asked(where: str, question: str, answer: str) -> None:
    """Refuses a blank question or answer, by an InputError that names the record."""
    if not answer.strip():
        raise InputError(f"{where}: no gold answer", got=repr(answer), remedy="Give questions with answers.")
    if not question.strip():
        raise InputError(f"{where}: no question", got=repr(question), remedy="Give it a text.")
