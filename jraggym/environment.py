"""The environment as a pure transition on `State`: no retriever, no gold answer, nothing to reset.

    action     below the last turn             on the last turn (turn number max_turns)
    Answer     answer set, done                answer set, done
    Search     turn with its documents         turn without documents, truncated
    Malformed  turn without documents          turn without documents, truncated

A search on the last turn could not be used by any answer, so it is not executed. Every agent thus has the same
budget: max_turns model calls and at most max_turns - 1 searches. When it ends, the latest answer so far that came with
a search is the answer.
"""

from __future__ import annotations

import dataclasses

from jraggym.errors import InputError
from jraggym.metrics import cover_exact_match, exact_match, hotpot_f1, multiple_choice
from jraggym.types import Action, Answer, Document, Example, Search, State, Turn


def transition(
    state: State,
    action: Action,
    documents: tuple[Document, ...] = (),
    error: str | None = None,
    digest: str | None = None,
    *,
    max_turns: int,
) -> State:
    """The state after `action`; `documents` and `error` are what an executed search brought (RAG-Gym 2.1).

    `digest` is a summary of the documents, for agents that read digests.

    Raises ValueError when the episode is over and InputError when documents or an error come with an action
    that does not search.
    """
    _check(state, max_turns)
    if not isinstance(action, Search) and (documents or error is not None):
        raise InputError(
            "only a search brings documents or an error", got=type(action).__name__, remedy="Ask wants_retrieval first."
        )
    if isinstance(action, Answer):
        return dataclasses.replace(state, answer=action.text, thought=action.thought)
    turns = (*state.turns, Turn(action, documents, error, digest))
    if len(turns) < max_turns:
        return dataclasses.replace(state, turns=turns)
    searches = [turn.action for turn in turns if isinstance(turn.action, Search) and turn.action.so_far is not None]
    best = searches[-1] if searches else Search("")
    return dataclasses.replace(state, turns=turns, truncated=True, answer=best.so_far, thought=best.thought)


def wants_retrieval(state: State, action: Action, max_turns: int) -> bool:
    """True for a search that a later turn can still use; raises ValueError when the episode is over."""
    _check(state, max_turns)
    return isinstance(action, Search) and len(state.turns) + 1 < max_turns


def outcome(state: State, example: Example) -> dict[str, float]:
    """The answer metrics em, f1 and cover_em of an episode, each in [0, 1]; all 0 for an unfinished one.

    A question with options is right or wrong: it also has accuracy, and the others equal it, as in RAG-Gym's averages.
    """
    right = correct(state.answer, example)
    if example.options:
        return dict.fromkeys(("em", "f1", "cover_em", "accuracy"), right)
    return {
        "em": right,
        "f1": hotpot_f1(state.answer, example.answers),
        "cover_em": cover_exact_match(state.answer, example.answers),
    }


def correct(answer: str | None, example: Example) -> float:
    """1.0 for an answer that names the right option or, without options, exactly matches a gold answer."""
    if example.options:
        return multiple_choice(answer, example.answers[0], dict(example.options))
    return exact_match(answer, example.answers)


def _check(state: State, max_turns: int) -> None:
    if max_turns < 1:
        raise InputError("max_turns must be at least 1", got=max_turns, remedy="Allow at least one turn.")
    if state.done:
        raise ValueError(f"the episode is over (answer={state.answer!r}, truncated={state.truncated})")
