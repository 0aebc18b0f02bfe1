"""Whether an episode is in good form: its parts as letters, which the protocol's regular expression matches.

    T  a thought between its tags          O  an observation             x  other text of the model
    S  a search between its tags           I  an invalid-action message  !  a tag without its partner
    A  an answer between its tags          F  a forced message

Whitespace is no letter. Only what the model wrote is searched for tags: an observation is one letter, whatever it
says and wherever a budget has cut it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from jraggym.protocols.protocol import Protocol
from jraggym.protocols.reading import final_answer, read_action
from jraggym.types import Answer, Piece, Search, Segment

_INSERTED = {Segment.OBSERVATION: "O", Segment.INVALID: "I", Segment.FORCED: "F"}


def is_valid(protocol: Protocol, pieces: Sequence[Piece]) -> bool:
    """True where an episode is in good form and its last turn has an answer; the prompt does not count."""
    if not re.fullmatch(protocol.sequence, letters(protocol, pieces)):
        return False
    turns = [text for segment, text in pieces if segment == Segment.MODEL]
    return bool(turns) and final_answer(protocol, turns[-1]) is not None


def letters(protocol: Protocol, pieces: Sequence[Piece]) -> str:
    """One letter for each part of an episode, in order."""
    own = _tag_letters if protocol.reader == "tags" else _action_letter
    return "".join(own(protocol, text) if s == Segment.MODEL else _INSERTED.get(s, "") for s, text in pieces)


def _action_letter(protocol: Protocol, text: str) -> str:
    action = read_action(protocol, text)
    return "S" if isinstance(action, Search) else "A" if isinstance(action, Answer) else "!"


def _tag_letters(protocol: Protocol, text: str) -> str:
    closing = {pair[0]: pair[1] for pair in (protocol.think, protocol.search, protocol.answer) if pair}
    named = {protocol.think: "T", protocol.search: "S", protocol.answer: "A"}
    letter = {pair[0]: name for pair, name in named.items() if pair}
    parts = re.split(f"({'|'.join(map(re.escape, protocol.tags))})", text)  # text, tag, text, tag ..., text
    found, place = [], 0
    while place < len(parts):
        part = parts[place]
        if place % 2 == 0:
            found.append("x" * bool(part.strip()))
            place += 1
        elif part in closing and parts[place + 2 : place + 3] == [closing[part]]:
            found.append(letter[part])
            place += 3
        else:
            found.append("!")
            place += 1
    return "".join(found)
