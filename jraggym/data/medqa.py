"""MedQA (Jin et al., 2021): questions of the medical licensing exam of the USA, multiple choice, without paragraphs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from jraggym.data.questions import QuestionSet, check, check_asked, check_texts, gathered
from jraggym.errors import InputError
from jraggym.retrieval.corpus import read_jsonl
from jraggym.types import Example

_FIELDS: dict[str, type] = {"question": str, "options": dict, "answer": str, "answer_idx": str}


def read_official(path: str | Path) -> QuestionSet:
    """Reads the official jsonl; there is no corpus.

    The options are part of the question's text, and the answers are the right letter and its text. An id is the
    file's name and the line, such as "train-17"; the kind is the exam's part (`meta_info`), where the file tells it.

    Raises:
      InputError: naming file and line, for a line that is no such record, a missing field or one of another type, a
        blank question, or an answer that is not the text of the option `answer_idx`.
    """
    items = []
    for line, record in read_jsonl(path):
        where = f"{path}, line {line}"
        check(where, record, _FIELDS, "MedQA")
        options, letter = record["options"], record["answer_idx"]
        check_texts(where, options.values(), "an option")
        check_asked(where, record["question"], record["answer"])
        if options.get(letter) != record["answer"]:
            got = f"{record['answer']!r}, and {letter!r} is {options.get(letter)!r}"
            raise InputError(f"{where}: the answer is not that option", got=got[:120], remedy="Give MedQA questions.")
        kind = record.get("meta_info", "")
        check_texts(where, [kind], "meta_info")
        question = question_with_options(record["question"], options)
        id, answers = f"{Path(path).stem}-{line}", (letter, record["answer"])
        items.append((Example(id, question, answers, kind, options=tuple(options.items())), ()))
    if not items:
        raise InputError(f"{path} holds no question", got="0 lines", remedy="Give at least one question.")
    return gathered(items, path)


def question_with_options(question: str, options: Mapping[str, str]) -> str:
    """The question and, on a line each, its options: "(A) text"."""
    return "\n".join([question.strip(), *(f"({letter}) {text}" for letter, text in options.items())])
