"""Episodes of a scripted policy, all stepped together: demonstrations for the warm start, and the oracle."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from jraggym.environment import transition, wants_retrieval
from jraggym.text.actions import format_action
from jraggym.types import Answer, Candidate, Document, Example, Search, State, Step, Trajectory

Script = Callable[[int, State], Search | Answer]  # (number of the example, state) -> action
Lookup = Callable[[Sequence[str]], Sequence[Sequence[Document]]]


def run_script(
    examples: Sequence[Example], script: Script, retriever: Lookup, budgets: Sequence[int]
) -> list[Trajectory]:
    """Runs `script` on each example for at most `budgets[i]` turns; one batched retrieval for each turn."""
    states = [State(example.question) for example in examples]
    steps: list[list[Step]] = [[] for _ in examples]
    while opened := [i for i, state in enumerate(states) if not state.done]:
        actions = {i: script(i, states[i]) for i in opened}
        wanted = [i for i in opened if wants_retrieval(states[i], actions[i], budgets[i])]
        queries = [action.query for i in wanted if isinstance(action := actions[i], Search)]
        found = dict(zip(wanted, retriever(queries), strict=True)) if wanted else {}
        for i in opened:
            documents = tuple(found.get(i, ()))
            candidate = Candidate(format_action(actions[i]), documents=tuple(d.id for d in documents))
            steps[i].append(Step(states[i], (candidate,), 0))
            states[i] = transition(states[i], actions[i], documents, max_turns=budgets[i])
    return [Trajectory(e.id, tuple(s), state) for e, s, state in zip(examples, steps, states, strict=True)]
