"""The one renderer: a state as text, for the actor, the critic, training and forced finishes alike.

    <question> Who is the mayor of the birthplace of Torvan Quilmer?
    <search> Torvan Quilmer birthplace</search>
    <document> Torvan Quilmer | A person born in Bexlis, who works for ...
    <document> ...
    <finish>                               (only when no search is left)

Rendering only appends: the segments of a state are the first segments of every later state. So a whole
episode can be trained in one sequence, with exactly the tokens that inference saw. Text from outside is
neutralised: a tag inside a document or a question can neither end a segment nor start an action.
"""

from __future__ import annotations

import re

from jraggym.text.actions import TAGS, format_action
from jraggym.types import Document, Malformed, Search, State, Turn

QUESTION, DOCUMENT, NOTHING, MALFORMED, FINISH = "<question>", "<document>", "<nothing>", "<malformed>", "<finish>"
MARKERS = (*TAGS, QUESTION, DOCUMENT, NOTHING, MALFORMED, FINISH)
_MARKER = re.compile("|".join(map(re.escape, MARKERS)))


def neutralise(text: str) -> str:
    """Defuses markers in text that comes from outside, by turning their "<" into a look-alike."""
    return _MARKER.sub(lambda match: "‹" + match.group()[1:], text)


def render(state: State, max_turns: int) -> tuple[str, ...]:
    """The state as segments; joined, they are the prompt. The prompt of the last turn ends with <finish>."""
    segments = [f"{QUESTION} {neutralise(state.question)}"]
    for turn in state.turns:
        segments.extend(render_turn(turn))
    if len(state.turns) + 1 >= max_turns:
        segments.append(FINISH)
    return tuple(segments)


def render_turn(turn: Turn) -> tuple[str, ...]:
    """What one turn appends: the action, then what came back."""
    if isinstance(turn.action, Malformed):
        return (MALFORMED,)
    action = Search(neutralise(turn.action.query), neutralise(turn.action.thought))
    return (format_action(action), *(map(render_document, turn.documents) if turn.documents else (NOTHING,)))


def render_document(document: Document) -> str:
    return f"{DOCUMENT} {neutralise(document.title)} | {neutralise(document.text)}"
