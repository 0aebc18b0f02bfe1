"""Checks of an episode's form, 1.0 or 0.0 each: the whole sequence, or balance, count, order and length of its parts.

Only what the model wrote is looked at, all its turns in a row; `combine.all_of` and `combine.failed` make one of many.
"""

from __future__ import annotations

import re

from jraggym.protocols.protocol import Pair
from jraggym.protocols.validity import is_valid, letters
from jraggym.rewards.answer import prediction
from jraggym.rewards.finished import Finished, Reward


def valid_sequence(finished: Finished) -> float:
    """Whether the episode is in the form that its protocol asks for."""
    return float(is_valid(finished.protocol, finished.pieces))


def ended(finished: Finished) -> float:
    """Whether the model ended the episode, and not a budget."""
    return float(finished.ended)


def balanced(pair: Pair) -> Reward:
    """Whether a tag is closed as often as it is opened."""

    def check(finished: Finished) -> float:
        text = _text(finished)
        return float(text.count(pair[0]) == text.count(pair[1]))

    return check


def occurs(text: str, least: int = 1, most: int | None = None) -> Reward:
    """Whether `text` occurs at least `least` and at most `most` times."""

    def check(finished: Finished) -> float:
        count = _text(finished).count(text)
        return float(least <= count and (most is None or count <= most))

    return check


def in_order(*texts: str) -> Reward:
    """Whether the first occurrences of the texts follow each other; one that does not occur fails."""

    def check(finished: Finished) -> float:
        places = [_text(finished).find(text) for text in texts]
        return float(min(places, default=0) >= 0 and places == sorted(places))

    return check


def free_of(pattern: str) -> Reward:
    """Whether the regular expression occurs nowhere."""
    found = re.compile(pattern)
    return lambda finished: float(not found.search(_text(finished)))


def searched(least: int = 1, most: int | None = None) -> Reward:
    """Whether the model searched so often, and each search was carried out."""

    def check(finished: Finished) -> float:
        parts = letters(finished.protocol, finished.pieces)
        count = parts.count("S")
        return float(count == parts.count("O") and least <= count and (most is None or count <= most))

    return check


def short_answer(words: int) -> Reward:
    """Whether there is an answer of at most `words` words."""

    def check(finished: Finished) -> float:
        answer = prediction(finished)
        return float(answer is not None and len(answer.split()) <= words)

    return check


def _text(finished: Finished) -> str:
    return "\n".join(finished.turns)
