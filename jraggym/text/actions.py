"""The action grammar: what a model output must look like to be executed.

    output  = [ "<think>" text "</think>" ] action
    action  = "<search>" text "</search>"  |  "<answer>" text "</answer>"

`text` is non-empty after stripping, holds none of the tags and no control character, and is at most
`MAX_CHARS` long. Everything else is `Malformed(reason)`: it is counted, it is shown to the agent as a
malformed turn, and no part of it ever becomes a query or an answer.
"""

from __future__ import annotations

import unicodedata

from jraggym.types import Action, Answer, Malformed, Search

SEARCH, END_SEARCH = "<search>", "</search>"
ANSWER, END_ANSWER = "<answer>", "</answer>"
THINK, END_THINK = "<think>", "</think>"
TAGS = (SEARCH, END_SEARCH, ANSWER, END_ANSWER, THINK, END_THINK)
STOPS = (END_SEARCH, END_ANSWER)  # generation of an action ends with one of these
MAX_CHARS = 2_000


def format_action(action: Search | Answer) -> str:
    """Writes an action in the grammar; `parse_action` of it gives the action back.

    The space after the tag lets a subword tokenizer spell a name here as it spells it inside a sentence.
    """
    thought = f"{THINK} {action.thought}{END_THINK}" if action.thought else ""
    if isinstance(action, Search):
        return f"{thought}{SEARCH} {action.query}{END_SEARCH}"
    return f"{thought}{ANSWER} {action.text}{END_ANSWER}"


def parse_action(output: str) -> Action:
    """Reads a model output by the grammar above; never raises, never executes anything."""
    rest, thought = output.strip(), ""
    if rest.startswith(THINK):
        thought, closed, rest = rest[len(THINK) :].partition(END_THINK)
        if not closed:
            return Malformed("unclosed <think>")
        if any(tag in thought for tag in TAGS):
            return Malformed("tag inside <think>")
        rest = rest.lstrip()
    for opening, closing, build in ((SEARCH, END_SEARCH, Search), (ANSWER, END_ANSWER, Answer)):
        if rest.startswith(opening):
            return _body(rest[len(opening) :], closing, build, thought.strip())
    return Malformed("no <search> or <answer> at the start")


def _body(rest: str, closing: str, build: type[Search] | type[Answer], thought: str) -> Action:
    body, closed, tail = rest.partition(closing)
    if not closed:
        return Malformed(f"no {closing}")
    if tail:
        return Malformed(f"text after {closing}")
    if any(tag in body for tag in TAGS):
        return Malformed("tag inside the action")
    if fault := text_fault(body):
        return Malformed(fault)
    return build(body.strip(), thought)


def text_fault(text: str) -> str | None:
    """Why `text` can be neither a query nor an answer in any format, or None where it can."""
    if len(text) > MAX_CHARS:
        return f"longer than {MAX_CHARS} characters"
    if any(unicodedata.category(char) in ("Cc", "Cs") for char in text):
        return "control character"
    return None if text.strip() else "empty action"
