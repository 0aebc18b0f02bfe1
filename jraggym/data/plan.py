"""How a question can be solved, and scripted demonstrations that solve it imperfectly on purpose.

A warm start is imitation of such demonstrations. Their faults are systematic (whole groups of questions are
answered too early, searched twice or led astray), because a greedy imitator averages random noise away.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jraggym.types import Answer, Example, Search, State


@dataclass(frozen=True, slots=True)
class Plan:
    """The searches that find everything needed, in order, and the answer.

    `thoughts[i]`, `bridges[i]` and `detours[i]` are what one notes, what a hasty reader would answer, and whom
    the page also names, after i + 1 searches; `group` says what kind of question it is (faults are tied to groups).
    """

    queries: tuple[str, ...]
    thoughts: tuple[str, ...]
    bridges: tuple[str, ...]
    detours: tuple[tuple[str, ...], ...]
    answer: str
    group: str


@dataclass(frozen=True, slots=True)
class Faults:
    """Shares of faulty actions within the groups that are prone to that fault.

    Of all groups, `premature_groups` are prone to answering after too few searches, and so on; a group may
    be prone to several faults.
    """

    premature: float = 0.65
    premature_groups: float = 0.5
    redundant: float = 0.4
    redundant_groups: float = 0.2
    astray: float = 0.15
    astray_groups: float = 0.4

    def prone(self, fault: str, group: str) -> float:
        """The probability of `fault` in questions of `group`: its share, or 0 outside the prone groups."""
        draw = random.Random(f"{fault}/{group}").random()
        return getattr(self, fault) if draw < getattr(self, f"{fault}_groups") else 0.0


FLAWLESS = Faults(premature=0.0, redundant=0.0, astray=0.0)


def progress(plan: Plan, state: State) -> int:
    """How many of the plan's searches the state already holds, in order."""
    asked = {turn.action.query for turn in state.turns if isinstance(turn.action, Search)}
    return next((i for i, query in enumerate(plan.queries) if query not in asked), len(plan.queries))


def demonstrate(plan: Plan, state: State, faults: Faults, rng: random.Random, *, last_turn: bool) -> Search | Answer:
    """The scripted action at `state`: the plan's next one, or with the group's probability a fault.

    On the last turn the script answers with the best it has.
    """
    done = progress(plan, state)
    thought = plan.thoughts[done - 1] if done else ""
    if done == len(plan.queries):
        return Answer(plan.answer, thought)
    if last_turn:
        return Answer(plan.bridges[done - 1] if done else plan.answer, thought)
    if done and rng.random() < faults.prone("premature", plan.group):
        return Answer(plan.bridges[done - 1], thought)
    if done and not _repeats(state) and rng.random() < faults.prone("redundant", plan.group):
        return Search(plan.queries[done - 1], thought)
    if done and plan.detours[done - 1] and rng.random() < faults.prone("astray", plan.group):
        return Search(rng.choice(plan.detours[done - 1]), thought)
    return Search(plan.queries[done], thought)


def _repeats(state: State) -> bool:
    return len({turn.action for turn in state.turns}) < len(state.turns)


def oracle(example: Example, plan: Plan, state: State) -> Search | Answer:
    """The ceiling: the plan's searches, then the gold answer if all its documents were really retrieved."""
    done = progress(plan, state)
    if done < len(plan.queries):
        return Search(plan.queries[done])
    seen = {document.id for turn in state.turns for document in turn.documents}
    return Answer(example.answers[0] if set(example.support) <= seen else "unknown")


Plans = Mapping[str, Plan]


def plan_by_titles(example: Example, beside: Sequence[str] = ()) -> Plan:
    """A plan from supporting documents alone: search their titles, those named in the question first.

    A wrong hop leads to one of the titles `beside` them.
    """
    named = [title for title in example.support if _bare(title).lower() in example.question.lower()]
    titles = tuple(map(_bare, named + [title for title in example.support if title not in named]))
    later = (*titles[1:], example.answers[0])
    detours = tuple(_bare(title) for title in beside if title not in example.support)
    return Plan(
        titles,
        titles,
        later,
        (detours,) * len(titles),
        example.answers[0],
        f"{example.kind}/{len(titles)}/{len(named)}",
    )


def _bare(title: str) -> str:
    """The title without a parenthesis that tells it from its namesakes."""
    return title.split(" (")[0]
