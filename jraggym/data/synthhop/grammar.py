"""What can be said in synthhop: relations, the paragraphs that state them, and how questions ask for them."""

from __future__ import annotations

from dataclasses import dataclass

KINDS = {"person": 1, "film": 1, "book": 1, "company": 1, "city": 1}  # kind -> words in a name


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

# Each paragraph names its subject beside the title, so that a search for an entity finds its own page before
# the pages that mention it.
PARAGRAPHS = {
    "person": (
        "{name} is a person with birthplace {birthplace}, employer {employer} and spouse {spouse}.",
        "{name} works for the employer {employer}. The birthplace is {birthplace}, the spouse {spouse}.",
        "Married to the spouse {spouse}, {name} has birthplace {birthplace} and employer {employer}.",
    ),
    "film": (
        "{name} is a film by the director {director} for the studio {studio}.",
        "Made by the studio {studio}, the film {name} has director {director}.",
        "The director of {name} is {director}, the studio {studio}.",
    ),
    "book": (
        "{name} is a book by the author {author}, from the publisher {publisher}.",
        "Brought out by the publisher {publisher}, the book {name} has author {author}.",
        "The author of {name} is {author}, the publisher {publisher}.",
    ),
    "company": (
        "{name} is a company with headquarters {headquarters} and founder {founder}.",
        "Started by the founder {founder}, {name} has headquarters {headquarters}.",
        "The founder of {name} is {founder}; headquarters {headquarters}.",
    ),
    "city": (
        "{name} is a city with mayor {mayor} and twin {twin}.",
        "The twin of {name} is {twin}, the mayor {mayor}.",
        "Governed by the mayor {mayor}, {name} has twin {twin}.",
    ),
}

WH = {"person": "Who", "company": "Which company", "city": "Which city"}
QUESTIONS = ("{wh} is {chain}?", "Name {chain}.", "Find {chain}.")
SAME = ("Is {a} also {b}?", "Are {a} and {b} the same?")
CHOICE = ("Which of {x} and {y} has {value} as {relation}?", "Does {x} or {y} have {value} as {relation}?")


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
