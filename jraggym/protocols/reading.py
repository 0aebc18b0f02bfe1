"""From what a model wrote in a turn to its action, and to its answer; nothing that it writes is executed.

`read_action` is strict, since it decides what is carried out. `final_answer` is what a reward scores: it finds an
answer in a turn of bad form, too, whose form is the business of another term.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from jraggym.agents.output import ANSWER, QUERY, query_or_answer, read_output
from jraggym.protocols.protocol import Pair, Protocol
from jraggym.text.actions import text_fault
from jraggym.types import Action, Answer, Malformed, Search


def read_action(protocol: Protocol, turn: str, may_search: bool = True) -> Action:
    """The action of the model's last turn (its own text alone, what came before or after left out); never raises.

    A search where none is allowed is Malformed.
    """
    return READERS[protocol.reader](protocol, turn, may_search)


def final_answer(protocol: Protocol, response: str) -> str | None:
    """The answer in the model's last turn, "" where its place is empty and None where there is none; never raises.

    Prompt and observations are no part of `response`: an example answer in a prompt is not the model's.
    """
    found: str | None = response
    for name in protocol.extract:
        if found is not None:
            found = EXTRACTORS[name](protocol, found)
    return found


def _read_tags(protocol: Protocol, turn: str, may_search: bool) -> Action:
    """One search that ends the turn, or one answer; thoughts and plain text may stand before."""
    for stop in protocol.stops:
        if turn.partition(stop)[2].strip():
            return Malformed(f"text after {stop}")
    if protocol.result and any(tag in turn for tag in protocol.result):
        return Malformed(f"{protocol.result[0]} is for what a search brings")
    searches, answers = _bodies(protocol.search, turn), _bodies(protocol.answer, turn)
    if searches is None or answers is None:
        return Malformed("the tags of an action are no pairs")
    if len(searches) + len(answers) > 1:
        return Malformed("more than one action")
    if searches:
        return _search(protocol, turn, searches[0]) if may_search else Malformed("no search is left")
    text = final_answer(protocol, turn)
    if text is None:
        return Malformed(f"no answer by {' and '.join(protocol.extract)}" if answers else "no action")
    text = " ".join(text.split())
    before = turn.partition(protocol.answer[0])[0] if protocol.answer else turn
    fault = text_fault(text)
    return Answer(text, _thought(protocol, before)) if fault is None else Malformed(fault)


def _search(protocol: Protocol, turn: str, body: str) -> Action:
    assert protocol.search is not None
    before, _, rest = turn.partition(protocol.search[0])
    if rest[len(body) + len(protocol.search[1]) :].strip():
        return Malformed(f"text after {protocol.search[1]}")
    query = " ".join(body.split())
    fault = text_fault(query)
    return Search(query, _thought(protocol, before)) if fault is None else Malformed(fault)


def _bodies(pair: Pair | None, text: str) -> list[str] | None:
    """What stands between the tags, or None where tags are no pairs."""
    if pair is None:
        return []
    before, *parts = text.split(pair[0])
    if pair[1] in before or any(part.count(pair[1]) != 1 for part in parts):
        return None
    return [part.partition(pair[1])[0] for part in parts]


def _thought(protocol: Protocol, before: str) -> str:
    for tag in protocol.think or ():
        before = before.replace(tag, "")
    return before.strip()


def _read_sections(protocol: Protocol, turn: str, may_search: bool) -> Action:
    return query_or_answer(read_output(turn, keys=(QUERY, ANSWER)), last=not may_search)


def _answer_tags(protocol: Protocol, text: str) -> str | None:
    """The text of the last closed pair of answer tags."""
    if protocol.answer is None:
        return None
    _, *parts = text.split(protocol.answer[0])
    closed = [part.partition(protocol.answer[1])[0] for part in parts if protocol.answer[1] in part]
    return closed[-1].strip() if closed else None


def _sections_answer(protocol: Protocol, text: str) -> str | None:
    read = read_output(text, keys=(QUERY, ANSWER))
    return None if isinstance(read, Malformed) else read.answer


def braced(command: str, text: str) -> str | None:
    r"""The argument of the last closed \command{...}, braces inside it included; None where there is none."""
    last, argument = -1, None
    opened: list[tuple[int, bool]] = []  # where each open brace's argument begins, and whether it is the command's
    for match in re.finditer(r"\\[{}]|(\\" + re.escape(command) + r"\s*)?\{|\}", text):
        if match.group().startswith("\\") and match[1] is None:
            continue  # \{ and \} are characters
        if match.group() != "}":
            opened.append((match.end(), match[1] is not None))
        elif opened:
            start, own = opened.pop()
            if own and start > last:
                last, argument = start, text[start : match.start()].strip()
    return argument


READERS: dict[str, Callable[[Protocol, str, bool], Action]] = {"tags": _read_tags, "sections": _read_sections}

EXTRACTORS: dict[str, Callable[[Protocol, str], str | None]] = {
    "answer": _answer_tags,
    "boxed": lambda _, text: braced("boxed", text),
    "textbf": lambda _, text: braced("textbf", text),
    "sections": _sections_answer,
}
