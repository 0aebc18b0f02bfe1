"""What is the same to every source: an action in words, without the thought before it."""

from __future__ import annotations

from collections.abc import Sequence

from jraggym.types import Action, Answer, Search


def wording(action: Action) -> str:
    """ "Query: ..", "Answer: .." or "Malformed: .."; equal actions have equal words, whatever was thought before."""
    if isinstance(action, Search):
        return f"Query: {action.query}"
    if isinstance(action, Answer):
        return f"Answer: {action.text}"
    return f"Malformed: {action.reason}"


def same_action(actions: Sequence[Action]) -> list[list[int]]:
    """The places of each distinct action, the actions in the order of their words."""
    places: dict[str, list[int]] = {}
    for place, action in enumerate(actions):
        places.setdefault(wording(action), []).append(place)
    return [places[words] for words in sorted(places)]
