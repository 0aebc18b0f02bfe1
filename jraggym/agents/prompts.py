"""How all agents write their prompts: one system message that never changes, and one user message with the state.

    system   what the agent is to do, and the output format
    user     ### Question, ### Documents or ### Search history, and on the last turn ### Last turn

Text from outside is neutralised: no document, question, query or digest can open a section, a code block or a turn.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from jraggym.agents.output import OUTPUT, format_output, heading
from jraggym.chat_model import Message
from jraggym.types import Document, Malformed, Search, State, Turn

QUESTION = "Question"
DOCUMENTS = "Documents"
HISTORY = "Search history"
LAST = "Last turn"
REJECTED = "Your last reply was not accepted"

ANSWER_TEXT = "the answer, in as few words as possible"
# headings, fences, and what opens or ends a turn in the chat templates of common models: an endpoint may read it so
_MARKER = re.compile(r"#{3,}|`{3,}|<(?=\||/?s>|/?think>|(?:start|end)_of_turn>)|\[(?=/?INST\])")
_LOOK_ALIKE = str.maketrans("#`<[", "＃ˋ‹［")


def neutralise(text: str) -> str:
    """Defuses headings, code fences and the marks of chat templates in text from outside, by look-alikes."""
    return _MARKER.sub(lambda match: match.group().translate(_LOOK_ALIKE), text)


def one_line(text: str) -> str:
    """Neutralised, and on one line: text that stands behind a label, such as a document's."""
    return neutralise(" ".join(text.split()))


def instruct(task: str, sections: Mapping[str, str], *objects: Mapping[str, str | None]) -> str:
    """A system message: the task, what belongs in each section, and the JSON objects that may end the reply."""
    layouts = [format_output(values, sections) for values in objects]
    ends = [f"or, instead of that object,\n{text.split(heading(OUTPUT))[1].strip()}" for text in layouts[1:]]
    return "\n\n".join(
        [task, "Write your reply in this form, and write nothing after the JSON object:", layouts[0], *ends]
    )


def chat(system: str, state: State, *parts: tuple[str, str]) -> tuple[Message, ...]:
    """The two messages: `parts` are the sections (heading, text) of the user's message under the question.

    Where the latest reply was no action, the message ends with the reason.
    """
    sections = [(QUESTION, neutralise(state.question.strip())), *parts]
    if state.turns and isinstance(wrong := state.turns[-1].action, Malformed):
        sections.append((REJECTED, one_line(wrong.reason)))
    text = "\n\n".join(f"{heading(name)}\n{text}" for name, text in sections)
    return Message("system", system), Message("user", text)


def searches(state: State) -> list[tuple[Search, Turn]]:
    """The turns that searched; what was malformed has no place in a history."""
    return [(turn.action, turn) for turn in state.turns if isinstance(turn.action, Search)]


def documents_text(documents: Sequence[Document]) -> str:
    """One line for each document."""
    lines = [f"[{i}] {one_line(d.title)}: {one_line(d.text)}" for i, d in enumerate(documents, 1)]
    return "\n".join(lines) or "(none)"


def history_text(state: State, digests: bool = False) -> str:
    """Each query with its documents, or with the digest of them."""
    found = [
        f"Query: {one_line(search.query)}\n{_digest(turn) if digests else documents_text(turn.documents)}"
        for search, turn in searches(state)
    ]
    return "\n\n".join(found) or "(nothing has been searched yet)"


def _digest(turn: Turn) -> str:
    return f"Found: {one_line(turn.digest or '') or '(nothing)'}"
