"""What can be said in synthhop: relations, the paragraphs that state them, and how questions ask for them."""

from __future__ import annotations

from dataclasses import dataclass

KINDS = {"person": 2, "film": 2, "book": 2, "company": 1, "city": 1}  # kind -> words in a name


@dataclass(frozen=True, slots=True)
class Relation:
    """A functional relation: each entity of kind `subject` has one value of kind `object`."""

    name: str
    subject: str
    object: str
    phrases: tuple[str, ...]


RELATIONS = {
    r.name: r
    for r in (
        Relation("birthplace", "person", "city", ("the birthplace of {}", "the city where {} was born")),
        Relation("employer", "person", "company", ("the employer of {}", "the company that {} works for")),
        Relation("spouse", "person", "person", ("the spouse of {}", "the person married to {}")),
        Relation("director", "film", "person", ("the director of {}", "the person who directed {}")),
        Relation("studio", "film", "company", ("the studio of {}", "the company that produced {}")),
        Relation("author", "book", "person", ("the author of {}", "the person who wrote {}")),
        Relation("publisher", "book", "company", ("the publisher of {}", "the company that published {}")),
        Relation("founder", "company", "person", ("the founder of {}", "the person who founded {}")),
        Relation("headquarters", "company", "city", ("the headquarters of {}", "the city where {} is based")),
        Relation("mayor", "city", "person", ("the mayor of {}", "the person who governs {}")),
        Relation("twin", "city", "city", ("the twin city of {}", "the city twinned with {}")),
    )
}

PARAGRAPHS = {
    "person": (
        "A person born in {birthplace}, who works for {employer} and is married to {spouse}.",
        "Works for {employer}. Born in {birthplace}; spouse {spouse}.",
        "The spouse of {spouse}, born in {birthplace}. The employer is {employer}.",
    ),
    "film": (
        "A film directed by {director} and produced by {studio}.",
        "Produced by the studio {studio}, this film has {director} as director.",
        "The director of this film is {director}; the studio is {studio}.",
    ),
    "book": (
        "A book written by {author} and published by {publisher}.",
        "Published by {publisher}, this book is the work of {author}, the author.",
        "The author of this book is {author}; the publisher is {publisher}.",
    ),
    "company": (
        "A company based in {headquarters}. It was founded by {founder}.",
        "Founded by {founder}, the company has its headquarters in {headquarters}.",
        "The founder of this company is {founder}; the headquarters are in {headquarters}.",
    ),
    "city": (
        "A city governed by {mayor} and twinned with {twin}.",
        "The twin city is {twin}. The mayor is {mayor}.",
        "{mayor} is the mayor of this city, a twin of {twin}.",
    ),
}

WH = {"person": "Who", "company": "Which company", "city": "Which city"}
QUESTIONS = ("{wh} is {chain}?", "Name {chain}.", "Find {chain}.")
SAME = ("Is {a} also {b}?", "Are {a} and {b} the same?")
CHOICE = ("Which of {x} and {y} has {value} as {relation}?", "Does {x} or {y} have {value} as {relation}?")

MAX_HOPS = 3


def chains(hops: int) -> list[tuple[str, ...]]:
    """Every sequence of `hops` relations in which each object kind is the next subject kind.

    Two relations in a row never undo or repeat each other (the spouse of the spouse, the twin of the twin).
    """
    found: list[tuple[str, ...]] = [()]
    for _ in range(hops):
        found = [
            (*chain, r.name)
            for chain in found
            for r in RELATIONS.values()
            if not chain or (RELATIONS[chain[-1]].object == r.subject and chain[-1] != r.name)
        ]
    return found
