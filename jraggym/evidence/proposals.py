"""Proposals: the searches that a state suggests by the names in its question and in the documents read so far.

    question   When did the director of film Human Flow die?
    read       Human Flow: ... directed by Ai Weiwei ...

    query                                  why, which is what a critic reads beside the question
    (the question)                         the question itself
    Human Flow Human Flow When did ...     Human Flow | question 1
    Ai Weiwei Ai Weiwei When did ...       Ai Weiwei | 1.2 x1 Human Flow: German documentary film directed by Ai ...
    (the question)                         more for the question, once it has been asked

A name comes twice in its query, so that BM25 weighs it above the words of the question, which say what is asked of it.
"1.2 x1" is its place, the second name of the first document read, and the number of documents read that hold it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from jraggym.metrics import normalize_answer
from jraggym.types import Document, Search, State

_WORD = r"(?:(?:[A-Z]|Dr|Mr|Mrs|Ms|St)\.(?=\s+[A-Z])|[A-Z0-9](?:[\w'’\-]|\.(?=\w))*)"  # no full stop but "J. R.", "U.S"
_INNER = r"(?:of|the|and|de|in|la|von|van|for|du|der|on|&|to|a|at|del|di|da|el|al)"
_NAME = re.compile(rf"{_WORD}(?:\s+{_WORD}|(?:\s+{_INNER})+\s+(?=[A-Z]){_WORD})*")  # not "Ai Weiwei in 2017"
_OPENERS = frozenset(
    "a after an and are as at before by did do does during for from he her his how in is it its of on or she that the"
    " their there these they this those to was were what when where which who whom whose why with".split()
)
_EDGES = " .,;:'’-"


@dataclass(frozen=True, slots=True)
class Proposal:
    """A candidate search, and why: what a critic reads about it beside the question."""

    query: str
    why: str


def names(text: str) -> list[str]:
    """Runs of capitalised words and numbers, in order, each once: "who directed The Lion of Thebes?" has one."""
    return list(dict.fromkeys(filter(None, map(_trimmed, _NAME.findall(text)))))


def _trimmed(run: str) -> str:
    """Without an opening such as "When" or "In The", and without a possessive; empty when no name is left."""
    words = run.split()
    while words and words[0].lower().strip(_EDGES) in _OPENERS:
        words.pop(0)
    name = re.sub(r"['’]s?$", "", " ".join(words).strip(_EDGES))
    return name if len(name) > 2 and not name.isdigit() else ""


def propose(state: State, around: int = 8) -> tuple[Proposal, ...]:
    """The searches that a state suggests: its question, the names in it, and the names read, in this order.

    Left out are names asked for before, and names whose own document has been read. The question can be asked again,
    as the last proposal, since a search brings what has not been read. `around` is the number of words on either side
    of a name that a critic reads.
    """
    asked = {turn.action.query for turn in state.turns if isinstance(turn.action, Search)}
    read = [document for turn in state.turns for document in turn.documents]
    known = {normalize_answer(document.title) for document in read}
    first, again = Proposal(state.question, "the question itself"), Proposal(state.question, "more for the question")
    found = {} if state.question in asked else {"": first}
    for key, name, where in _named(state.question, read, around):
        if key not in known and key not in found:
            found[key] = Proposal(f"{name} {name} {state.question}", f"{name} | {where}")
    new = tuple(proposal for proposal in found.values() if proposal.query not in asked)
    return (*new, again) if state.question in asked else new


def _named(question: str, read: list[Document], around: int) -> Iterator[tuple[str, str, str]]:
    """Each mention of a name: what stands for all spellings, the name, and where it stands."""
    holding = Counter(key for document in read for key in {key for key, *_ in _mentions(document, around)})
    for place, name in enumerate(names(question), 1):
        yield normalize_answer(name), name, f"question {place}"
    for number, document in enumerate(read, 1):
        for place, (key, name, where) in enumerate(_mentions(document, around), 1):
            yield key, name, f"{number}.{place} x{holding[key]} {where}"


@lru_cache(maxsize=1 << 16)
def _mentions(document: Document, around: int) -> tuple[tuple[str, str, str], ...]:
    """The names in a document, each with the document's title and the words around its first mention."""
    return tuple(
        (normalize_answer(name), name, f"{document.title}: {_around(document.text, name, around)}")
        for name in names(document.text)
    )


def _around(text: str, name: str, words: int) -> str:
    before, found, after = text.partition(name)
    return " ".join([*before.split()[-words:], found, *after.split()[:words]])
