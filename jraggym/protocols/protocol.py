"""What a tag protocol is: how a model that writes one growing text asks for searches, and what it is shown.

    prompt | model ... <search> q </search> | observation | model ... <answer> a </answer>

A protocol is data alone, and the functions of this package read it. So a new system is a new instance, and a recipe
changes one (shorter prompts, another message) with `dataclasses.replace`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from jraggym.chat_model import Message
from jraggym.errors import InputError
from jraggym.types import Document

Pair = tuple[str, str]  # an opening and a closing tag

_LOOK_ALIKE = str.maketrans("<#`", "‹＃ˋ")


@dataclass(frozen=True, slots=True)
class Protocol:
    """The words of one system. Texts hold places by name: {question}, {found}, and {rank}, {title}, {text}.

    `sequence` is a regular expression over the letters of `validity.letters`, which an episode in good form matches.
    """

    name: str
    prompt: tuple[Message, ...]  # with {question}
    closed_prompt: tuple[Message, ...]  # the same for a sample that may not search
    stops: tuple[str, ...]  # strings that end the model's turn, in whatever tokens they are written
    extract: tuple[str, ...]  # from a turn to its answer: names of reading.EXTRACTORS, one after the other
    sequence: str
    reader: str = "tags"  # of a turn's action: a name of reading.READERS
    search: Pair | None = None
    answer: Pair | None = None
    think: Pair | None = None
    result: Pair | None = None  # the tags of an observation, which the model must not write
    marks: tuple[str, ...] = ()  # what else no text from outside may hold
    needs_end: bool = False  # an episode has ended only with the end token
    observation: str = "{found}"
    document: str = "{text}"
    between: str = "\n"  # two documents
    nothing: str = "Nothing was found."
    digests: bool = False  # what is found is shown as a digest of it
    invalid: str | None = None  # inserted after an action that is none; None: such an action ends the episode
    repeated: str | None = None  # found in place of documents by a query that has been asked before; None: asked again
    limit: str | None = None  # found by a search beyond the budget; None: such a search is no action
    forced: str | None = None  # inserted before the last turn, when the budget of searches is spent

    @property
    def tags(self) -> tuple[str, ...]:
        """All tags of actions, thoughts and observations."""
        return tuple(tag for pair in (self.think, self.search, self.result, self.answer) if pair for tag in pair)


def opening(protocol: Protocol, question: str, may_search: bool = True) -> tuple[Message, ...]:
    """The messages that open an episode, for a chat template or `plain`; whether to search is not read from text."""
    asked = neutralise(protocol, question.strip())
    messages = protocol.prompt if may_search else protocol.closed_prompt
    return tuple(Message(m.role, m.content.replace("{question}", asked)) for m in messages)


def plain(messages: Sequence[Message]) -> str:
    """The opening of an episode for a model without a chat template."""
    return "\n\n".join(message.content for message in messages) + "\n"


def observation(protocol: Protocol, documents: Sequence[Document], digest: str | None = None) -> str:
    """What the model is shown of a search: its documents, or in their place the text `digest`.

    `protocol.repeated` and `protocol.limit` are shown as a digest, too. What comes from outside is neutralised.
    Raises InputError where a protocol that shows digests has documents and no digest.
    """
    if digest is None and documents and protocol.digests:
        remedy = "Give one, or show documents: dataclasses.replace(protocol, digests=False)."
        raise InputError(f"{protocol.name} shows a digest of what is found", got="documents alone", remedy=remedy)
    if digest is None:
        shown = (_document(protocol, rank, document) for rank, document in enumerate(documents, 1))
        found = protocol.between.join(shown)
    else:
        found = neutralise(protocol, digest.strip())
    return protocol.observation.replace("{found}", found or protocol.nothing)


def neutralise(protocol: Protocol, text: str) -> str:
    """Defuses the protocol's tags and marks in text from outside, by look-alikes."""
    marks = (*protocol.tags, *protocol.marks)
    found = "|".join(map(re.escape, marks))
    return re.sub(found, lambda match: match.group().translate(_LOOK_ALIKE), text) if marks else text


def _document(protocol: Protocol, rank: int, document: Document) -> str:
    values = {
        "rank": str(rank),
        "title": neutralise(protocol, document.title.strip()),
        "text": neutralise(protocol, document.text.strip()),
    }
    return re.sub(r"\{(rank|title|text)\}", lambda match: values[match[1]], protocol.document)
