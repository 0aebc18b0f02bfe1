"""Monte-Carlo roll-outs: an action is worth what the policy makes of the state behind it (Math-Shepherd).

candidates -> the state after each one -> M continuations of each, all in one batch -> mean outcome
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from jax import Array

from jraggym.agents.digests import Asked, Digest
from jraggym.environment import outcome, transition, wants_retrieval
from jraggym.errors import InputError
from jraggym.labelling import Decision
from jraggym.rollout import Policy, Rollout
from jraggym.types import Example, Search, State

# Questions and the states that their episodes go on from -> the final states, None where the policy failed
Play = Callable[[Sequence[Example], Sequence[State]], Sequence[State | None]]
METRICS = ("em", "f1", "cover_em")
Read = Callable[[Sequence[Asked]], Sequence[Digest]]


@dataclass(frozen=True)
class RolloutSource:
    """The mean outcome of `continuations` episodes of the policy from the state after a candidate (arXiv 2312.08935).

    An action that ends the episode is worth its outcome. `play` draws one action a turn and has no judge; `read` makes
    the digests of an agent that reads these. A reward depends on the example, state, action and documents, not on the
    batch; `metric` is em, f1 or cover_em.
    """

    play: Play
    max_turns: int
    continuations: int = 4
    metric: str = "em"
    read: Read | None = None

    def __post_init__(self) -> None:
        if self.continuations < 1:
            raise InputError("roll-outs need continuations", got=self.continuations, remedy="Use 1 or more.")
        if self.metric not in METRICS:
            raise InputError("unknown outcome", got=repr(self.metric), remedy=f"Use one of {', '.join(METRICS)}.")

    def __call__(self, decisions: Sequence[Decision]) -> list[tuple[float | None, ...]]:
        """The rewards; None where a search's documents or their digest are not known, or no continuation came."""
        after = self._after(decisions)
        distinct = {(d.example, s): None for d, row in zip(decisions, after, strict=True) for s in row if s is not None}
        ended = {at: outcome(at[1], at[0])[self.metric] for at in distinct if at[1].done}
        worth = ended | self._continue([at for at in distinct if not at[1].done])
        return [
            tuple(None if s is None else worth[d.example, s] for s in row)
            for d, row in zip(decisions, after, strict=True)
        ]

    def _continue(self, opened: Sequence[tuple[Example, State]]) -> dict[tuple[Example, State], float | None]:
        """The mean outcome from each open state."""
        m = self.continuations
        copies = [_copy(example, state, number) for example, state in opened for number in range(m)]
        finals = self.play(copies, [state for _, state in opened for _ in range(m)])
        results = [
            None if final is None else outcome(final, copy)[self.metric]
            for final, copy in zip(finals, copies, strict=True)
        ]
        known = [[one for one in results[m * i : m * (i + 1)] if one is not None] for i in range(len(opened))]
        return {at: sum(found) / len(found) if found else None for at, found in zip(opened, known, strict=True)}

    def _after(self, decisions: Sequence[Decision]) -> list[list[State | None]]:
        """The state after each candidate."""
        searched = [
            [isinstance(action, Search) and wants_retrieval(d.state, action, self.max_turns) for action in d.actions]
            for d in decisions
        ]
        digests: dict[Asked, Digest] = {}
        if self.read is not None:
            asked = [
                (d.state.question, action.query, tuple(hits))
                for d, row in zip(decisions, searched, strict=True)
                for action, hits, carried in zip(d.actions, d.found, row, strict=True)
                if carried and hits and isinstance(action, Search)
            ]
            distinct = list(dict.fromkeys(asked))
            digests = dict(zip(distinct, self.read(distinct), strict=True)) if distinct else {}
        found: list[list[State | None]] = []
        for d, row in zip(decisions, searched, strict=True):
            states: list[State | None] = []
            for action, hits, carried in zip(d.actions, d.found, row, strict=True):
                query = action.query if isinstance(action, Search) else ""
                digest = digests.get((d.state.question, query, tuple(hits or ())), Digest(None)) if carried else None
                if carried and (hits is None or (digest is not None and digest.error is not None)):
                    states.append(None)
                    continue
                documents, text = (tuple(hits or ()), digest.text) if digest is not None else ((), None)
                states.append(transition(d.state, action, documents, None, text, max_turns=self.max_turns))
            found.append(states)
        return found


def policy_rollouts(
    rollout: Rollout, policy: Policy, key: Array, continuations: int = 4, metric: str = "em"
) -> RolloutSource:
    """Roll-outs of a policy in jax; `rollout` draws one action a turn and has no judge."""

    def play(examples: Sequence[Example], starts: Sequence[State]) -> list[State]:
        return [trajectory.final for trajectory in rollout.run(policy, examples, key, starts=starts)]

    return RolloutSource(play, rollout.max_turns, continuations, metric)


def _copy(example: Example, state: State, number: int) -> Example:
    """The example under a name that decides its draws, whatever else is in the batch."""
    digest = hashlib.sha256(repr(state).encode(errors="surrogatepass")).hexdigest()
    return replace(example, id=f"{example.id}/{digest}/{number}")
