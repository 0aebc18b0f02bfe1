"""The one output format of all agents: sections under fixed headings, and one JSON object at the end.

    ### Step-by-step Reasoning
    The mayor of Morn is Ada Lindqvist. Where she was born is still open.
    ### Structured Output
    ```json
    {"generated_query": "Ada Lindqvist birthplace"}
    ```

The object holds texts under "predicted_answer" and "generated_query"; a missing one, null, a blank one and the word
"None" are all the same: there is none. Everything else is `Malformed(reason)`: it is counted, the agent is told, and no
part of it ever becomes a query or an answer. Nothing that a model writes is executed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from jraggym.text.actions import text_fault
from jraggym.types import Action, Answer, Malformed, Search

REASONING = "Step-by-step Reasoning"
CLAIMS = "Unverified Claim Identification"
OUTPUT = "Structured Output"
ANSWER, QUERY = "predicted_answer", "generated_query"

_OPEN, _CLOSE = "```json", "```"
_NONE = ("", "none", "null")


@dataclass(frozen=True, slots=True)
class Output:
    """A well-formed output; the thought is the text of the sections before the JSON object."""

    thought: str = ""
    answer: str | None = None
    query: str | None = None


def format_output(values: Mapping[str, str | None], sections: Mapping[str, str] | None = None) -> str:
    """Writes an output: the texts of its sections by heading, and the JSON object; `read_output` gives them back."""
    parts = [f"{heading(name)}\n{text}\n" for name, text in (sections or {}).items()]
    block = f"{_OPEN}\n{json.dumps(dict(values), ensure_ascii=False)}\n{_CLOSE}"
    return "\n".join([*parts, f"{heading(OUTPUT)}\n{block}"])


def heading(name: str) -> str:
    """The line that opens a section."""
    return f"### {name}"


def read_output(
    output: str, sections: Sequence[str] = (REASONING,), keys: Sequence[str] = (ANSWER,)
) -> Output | Malformed:
    """Reads an output that has these sections in this order and no other JSON keys; never raises.

    What stands before the first section, such as the thoughts of a reasoning model, is passed over.
    """
    lines = output.encode("utf-8", "replace").decode().split("\n")
    end = len(lines)
    texts: list[str] = []
    for name in reversed((*sections, OUTPUT)):
        start = next((i for i in reversed(range(end)) if lines[i].strip() == heading(name)), None)
        if start is None:
            return Malformed(f'no section "{name}" in its place')
        texts.insert(0, "\n".join(lines[start + 1 : end]).strip())
        end = start
    *thoughts, block = texts
    if not block.startswith(_OPEN):
        return Malformed(f'no json block right under "{OUTPUT}"')
    if not block.endswith(_CLOSE) or len(block) < len(_OPEN) + len(_CLOSE):
        return Malformed("the json block does not end the output")
    values = _read_json(block[len(_OPEN) : -len(_CLOSE)], keys)
    if isinstance(values, Malformed):
        return values
    return Output("\n\n".join(filter(None, thoughts)), values.get(ANSWER), values.get(QUERY))


def answer_of(read: Output | Malformed) -> Action:
    """The answer of an output that has to hold one."""
    if isinstance(read, Malformed):
        return read
    return Malformed(f'no "{ANSWER}"') if read.answer is None else Answer(read.answer, read.thought)


def query_or_answer(read: Output | Malformed, last: bool) -> Action:
    """The search or the answer of an output that has to hold one of the two, on the last turn the answer."""
    if isinstance(read, Malformed) or read.query is None:
        return answer_of(read)
    if read.answer is not None:
        return Malformed(f'both "{ANSWER}" and "{QUERY}"')
    return Malformed("a search on the last turn") if last else Search(read.query, read.thought)


def _read_json(text: str, keys: Sequence[str]) -> dict[str, str | None] | Malformed:
    try:
        found = json.loads(
            text, parse_int=str, parse_float=str, parse_constant=_refuse_constant, object_pairs_hook=_distinct
        )
    except RecursionError:
        return Malformed("invalid JSON: nested too deeply")
    except ValueError as error:
        return Malformed(f"invalid JSON: {error}")
    if not isinstance(found, dict):
        return Malformed("the JSON is no object")
    if not set(found) <= set(keys):
        return Malformed(f"JSON keys other than {' and '.join(keys)}")
    values: dict[str, str | None] = {}
    for key, value in found.items():
        text_or_none, fault = _text(key, value)
        if fault is not None:
            return Malformed(f'"{key}": {fault}')
        values[key] = text_or_none
    return values


def _text(key: str, value: Any) -> tuple[str | None, str | None]:
    """(text or None, None) or (None, fault). Line breaks become spaces; true and false answer a question."""
    if value is None:
        return None, None
    if isinstance(value, bool) and key == ANSWER:
        return "yes" if value else "no", None
    if not isinstance(value, str):
        return None, "not a text"
    text = " ".join(value.split())
    if text.strip(" .'\"").lower() in _NONE:
        return None, None
    return (text, None) if (fault := text_fault(text)) is None else (None, fault)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key comes twice")
    return found
