"""Process rewards: a judge grades the candidates of a state, and ranks become rewards.

The rule-based judge applies RAG-Gym's three criteria (appendix E, figure 10) with what the data knows: which
documents support the answer, and what each candidate's search would bring. Like the paper's annotator it takes
the agent to have no knowledge of its own. It never looks at a candidate's position.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jraggym.environment import correct
from jraggym.metrics import hotpot_f1
from jraggym.types import Action, Answer, Document, Example, Malformed, Search, State

Grade = tuple[float, ...]  # compared element by element; higher is better
Found = Sequence[Document] | None  # what a search brings; None for an action that retrieves nothing
Judge = Callable[[Example, State, Sequence[Action], Sequence[Found]], list[float]]


@dataclass(frozen=True, slots=True)
class Decision:
    """What a source of process rewards is asked about: the candidates at a state, and what each search brings."""

    example: Example
    state: State
    actions: tuple[Action, ...]
    found: tuple[Found, ...]


# Any source of process rewards: a reward in [0, 1] for each candidate of each decision, or None for an unlabelled one
RewardSource = Callable[[Sequence[Decision]], list[tuple[float | None, ...]]]

MALFORMED, TOO_LATE, PREMATURE, WRONG, REDUNDANT, USELESS, USEFUL, SUFFICIENT = map(float, range(8))


def rank_rewards(grades: Sequence[Grade], absent: int = 0) -> list[float]:
    """1 / (1 + rank), where rank counts the strictly better candidates (RAG-Gym, rank rule).

    Equal grades get equal rewards: grades (5, 3, 3, 5) become rewards (1, 1/3, 1/3, 1). `absent` counts better
    actions that nobody proposed.
    """
    return [1.0 / (1 + absent + sum(other > grade for other in grades)) for grade in grades]


def support_judge(
    example: Example,
    state: State,
    actions: Sequence[Action],
    found: Sequence[Found],
    queries: Sequence[str] = (),
) -> list[float]:
    """Process rewards of the candidates at `state`; `found` holds the documents that each search brings.

    `queries` are what an expert would ask, if that is known: of two searches that bring the same, the one whose words
    are closer to one of these is the more precise.
    A state always has a good action: a search for what is missing, or the right answer. Where no candidate is one,
    it counts as absent: the best of a bad lot gets 1/2, and no objective takes it for an example to follow.
    """
    grades = [grade(example, state, a, d, queries) for a, d in zip(actions, found, strict=True)]
    return rank_rewards(grades, absent=int(max(g[0] for g in grades) < USEFUL))


def grade(example: Example, state: State, action: Action, found: Found, queries: Sequence[str] = ()) -> Grade:
    """How good an action is by sufficiency, utility and redundancy.

    Sufficiency: once all supporting documents are read, the right answer is best and a further search is a
    waste; before, any answer is premature. Utility: a search is useful if it brings supporting documents that
    are still missing, the more, the higher up and the more precisely asked for the better. Redundancy: asking
    the same again, or bringing nothing new, is worse than an unlucky try. A search on the last turn is not
    carried out and comes too late.
    """
    seen = {document.id for turn in state.turns for document in turn.documents}
    missing = [i for i in example.support if i not in seen]
    if isinstance(action, Malformed):
        return (MALFORMED,)
    if isinstance(action, Answer):
        right = correct(action.text, example)
        if missing:
            return (PREMATURE, right)
        return (SUFFICIENT,) if right else (WRONG,)
    if found is None:
        return (TOO_LATE,)
    ids = [document.id for document in found]
    gained = [place for place, i in enumerate(ids) if i in missing]
    if gained:
        precision = hotpot_f1(action.query, queries) if queries else 0.0
        return (USEFUL, len(gained), -gained[0], precision)
    return _grade_useless(state, action, ids, seen)


def _grade_useless(state: State, action: Search, found: list[str], seen: set[str]) -> Grade:
    repeated = any(turn.action == action for turn in state.turns)
    if repeated or all(i in seen for i in found):
        return (REDUNDANT,)
    return (USELESS,)
