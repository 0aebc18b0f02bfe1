"""Monte-Carlo roll-outs: an action is worth what the policy makes of the state behind it (Math-Shepherd).

candidates -> the state after each one -> M continuations of each, all in one batch -> mean outcome
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from jax import Array

from jraggym.environment import outcome, transition, wants_retrieval
from jraggym.errors import InputError
from jraggym.labelling import Decision, Found
from jraggym.rollout import Policy, Rollout
from jraggym.types import Action, Example, Search, State


@dataclass(frozen=True)
class RolloutSource:
    """The mean outcome of `continuations` episodes of the policy from the state after a candidate (arXiv 2312.08935).

    An action that ends the episode is worth its outcome. The rollout draws one action a turn and has no judge. A
    reward depends on (key, example, state, action, documents), not on the batch; `metric` is em, f1 or cover_em.
    """

    rollout: Rollout
    policy: Policy
    key: Array
    continuations: int = 4
    metric: str = "em"

    def __post_init__(self) -> None:
        if self.continuations < 1:
            raise InputError("roll-outs need continuations", got=self.continuations, remedy="Use 1 or more.")

    def __call__(self, decisions: Sequence[Decision]) -> list[tuple[float | None, ...]]:
        """The rewards; None for a search whose documents are not known."""
        after = [
            [self._after(d.state, action, found) for action, found in zip(d.actions, d.found, strict=True)]
            for d in decisions
        ]
        distinct = {(d.example, s): None for d, row in zip(decisions, after, strict=True) for s in row if s is not None}
        ended = {at: outcome(at[1], at[0])[self.metric] for at in distinct if at[1].done}
        worth = ended | self._continue([at for at in distinct if not at[1].done])
        return [
            tuple(None if s is None else worth[d.example, s] for s in row)
            for d, row in zip(decisions, after, strict=True)
        ]

    def _continue(self, opened: Sequence[tuple[Example, State]]) -> dict[tuple[Example, State], float]:
        """The mean outcome from each open state."""
        m = self.continuations
        copies = [_copy(example, state, number) for example, state in opened for number in range(m)]
        starts = [state for _, state in opened for _ in range(m)]
        finals = [trajectory.final for trajectory in self.rollout.run(self.policy, copies, self.key, starts=starts)]
        results = [outcome(final, copy)[self.metric] for final, copy in zip(finals, copies, strict=True)]
        return {at: sum(results[m * i : m * (i + 1)]) / m for i, at in enumerate(opened)}

    def _after(self, state: State, action: Action, found: Found) -> State | None:
        turns = self.rollout.max_turns
        searched = isinstance(action, Search) and wants_retrieval(state, action, turns)
        if searched and found is None:
            return None
        return transition(state, action, tuple(found or ()) if searched else (), max_turns=turns)


def _copy(example: Example, state: State, number: int) -> Example:
    """The example under a name that decides its draws, whatever else is in the batch."""
    digest = hashlib.sha256(repr(state).encode(errors="surrogatepass")).hexdigest()
    return replace(example, id=f"{example.id}/{digest}/{number}")
