"""Where a turn ends: strings found in sampled text token by token, however a tokenizer cuts them.

A string such as "</search>" may be one token or several, and its last token may also hold what follows it. So no
sequence of ids stands for it. What does is an automaton over bytes (Aho-Corasick, 1975) whose state is how much of a
stop string the text so far ends with. Its steps are taken a whole token at a time from a table, on the device:

    state = table.step[state, token]        a turn ends when table.done[state]

Letters: E states, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from flax import struct

from jraggym.errors import InputError
from jraggym.text.tokenizer import Tokenizer

Array = np.ndarray


@struct.dataclass
class StopTable:
    """The automaton; state 0 is the start of a turn."""

    step: Array  # int16 [E, V]  the state after a token
    done: Array  # bool [E]  a stop string or an end token has been seen


def stop_table(tokens: Sequence[bytes], stops: Sequence[str], ends: Sequence[int] = ()) -> StopTable:
    """The table for a vocabulary, as the bytes that each token writes.

    Args: stops: strings, any of which ends a turn; ends: ids that end it by themselves.
    Raises InputError for an empty stop string, or where nothing ends a turn.
    """
    if not all(stops) or not (stops or ends):
        raise InputError("a turn needs something that ends it", got=list(stops), remedy="Give non-empty strings.")
    move, done = _automaton([stop.encode() for stop in stops])
    longest = max(map(len, tokens), default=0)
    written = np.zeros((len(tokens), longest), np.uint8)
    for row, token in zip(written, tokens, strict=True):
        row[: len(token)] = np.frombuffer(token, np.uint8)
    lengths = np.array([len(token) for token in tokens])
    step = np.repeat(np.arange(len(move), dtype=np.int16)[:, None], len(tokens), axis=1)
    for place in range(longest):  # all states and tokens at once, a byte at a time
        live = lengths > place
        step[:, live] = move[step[:, live], written[live, place]]
    step[:, list(ends)] = np.flatnonzero(done)[0]
    return StopTable(step, done)


def turn_end(table: StopTable, tokens: Sequence[int]) -> int | None:
    """How many of the tokens a turn has, the one that ends it included; None where none does."""
    state = 0
    for count, token in enumerate(tokens, 1):
        state = table.step[state, token]
        if table.done[state]:
            return count
    return None


def _automaton(stops: Sequence[bytes]) -> tuple[Array, Array]:
    """Moves int16 [E, 256] between the prefixes of the stops, and which are whole; one that is seen is never left."""
    prefixes = sorted({b""} | {stop[:n] for stop in stops for n in range(len(stop))}, key=lambda p: (len(p), p))
    name = {prefix: i for i, prefix in enumerate(prefixes)}
    seen = len(prefixes)
    move = np.zeros((seen + 1, 256), np.int16)
    for prefix, i in name.items():
        for byte in range(256):
            text = prefix + bytes([byte])
            if any(text.endswith(stop) for stop in stops):
                move[i, byte] = seen
            else:
                move[i, byte] = next(name[text[n:]] for n in range(len(text) + 1) if text[n:] in name)
    move[seen] = seen
    return move, np.arange(seen + 1) == seen


def token_texts(tokenizer: Tokenizer) -> list[bytes]:
    """What each id writes behind other text; part of a character is written as U+FFFD, which is in no stop string."""
    anchor = tokenizer.encode(["x"])[0][-1]
    before = len(tokenizer.decode([[anchor]])[0])
    return [text[before:].encode() for text in tokenizer.decode([[anchor, i] for i in range(tokenizer.vocab_size)])]
