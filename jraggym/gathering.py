"""Fresh experience for on-policy training: rollouts of the present policy as rows with rewards.

candidates   each visited state is a group: its K sampled actions, with process rewards (or critic scores)
episodes     each question is a group: K whole episodes, with outcome rewards on their ends and step rewards inside
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import jax
import numpy as np
from jax import Array

from jraggym.environment import outcome
from jraggym.errors import InputError
from jraggym.objectives.pairs import POSITIVE
from jraggym.rollout import Policy, Rollout
from jraggym.text.batching import Codec, Row
from jraggym.types import Example, Trajectory

GROUPS = ("candidates", "episodes")


@dataclass(frozen=True)
class Gathered:
    """One iteration's groups, and what the rollout cost and brought."""

    rows: list[Row]
    tokens: int  # sampled by the policy
    metrics: dict[str, float]


T = TypeVar("T")
Gather = Callable[[Policy, int], Gathered]  # a pure function of (policy, iteration)


def draw(examples: Sequence[T], number: int, iteration: int, seed: int = 0) -> list[T]:
    """The `number` questions (or states) of an iteration: every one once before any comes again."""
    count, places = len(examples), range(iteration * number, (iteration + 1) * number)
    epochs = {place // count for place in places}
    shuffled = {epoch: np.random.default_rng((seed, epoch)).permutation(count) for epoch in epochs}
    return [examples[int(shuffled[place // count][place % count])] for place in places]


@dataclass(frozen=True)
class Gatherer:
    """Draws questions and runs the policy on them; a pure function of (weights, iteration).

    With `groups="candidates"` the rollout samples K candidates of each state and has a judge, or else the policy a
    critic. With `groups="episodes"` it samples one action of each state, and `copies` episodes of each question.
    """

    rollout: Rollout
    codec: Codec
    examples: Sequence[Example]
    questions: int  # of an iteration
    key: Array
    groups: str = "candidates"
    copies: int = 1
    outcome: str = "f1"  # of an episode: em, f1 or cover_em
    need_good: bool = False  # leave out states where no candidate is good: a rank tells there which failure is best
    step_baseline: float = 0.5  # what the judge gives a useless step: else an agent is paid for never answering
    seed: int = 0

    def __post_init__(self) -> None:
        if self.groups not in GROUPS:
            raise InputError("unknown groups", got=self.groups, remedy=f"Use one of {', '.join(GROUPS)}.")
        if not self.examples:
            raise InputError("there is no question to train on", got="0 examples", remedy="Give at least one.")

    def __call__(self, policy: Policy, iteration: int, report: Callable[[int], None] | None = None) -> Gathered:
        """The groups of an iteration; `report` gets the number of finished episodes, from a callback."""
        chosen = draw(self.examples, self.questions, iteration, self.seed)
        whole = self.groups == "episodes"
        episodes = [example for example in chosen for _ in range(self.copies if whole else 1)]
        found = self.rollout.run(policy, episodes, jax.random.fold_in(self.key, iteration), report=report)
        results = [outcome(t.final, e) for t, e in zip(found, episodes, strict=True)]
        rows = self._episodes(found, [r[self.outcome] for r in results]) if whole else self._candidates(found, policy)
        sampled = [c for t in found for s in t.steps for c in s.candidates]
        metrics = {
            "episode_em": float(np.mean([r["em"] for r in results])),
            "episode_f1": float(np.mean([r["f1"] for r in results])),
            "turns": float(np.mean([len(t.steps) for t in found])),
            "groups": float(len(rows)),
        }
        return Gathered(rows, sum(len(c.tokens) for c in sampled), metrics)

    def _candidates(self, found: Sequence[Trajectory], policy: Policy) -> list[Row]:
        """One row for each visited state that teaches something; a critic's scores are rewards where there is one.

        Equal rewards have no advantage (dynamic sampling, arXiv 2503.14476).
        """
        rows = []
        for step in (step for trajectory in found for step in trajectory.steps):
            candidates = step.candidates
            if policy.critic is not None:
                candidates = tuple(replace(c, reward=c.score) for c in candidates)
            row = self.codec.samples(step.state, candidates)
            rewards = {r for r, real in zip(row.rewards, row.distinct, strict=True) if real}
            if len(rewards) > 1 and not (self.need_good and max(rewards) <= POSITIVE):
                rows.append(row)
        return rows

    def _episodes(self, found: Sequence[Trajectory], rewards: Sequence[float]) -> list[Row]:
        starts = range(0, len(found), self.copies)
        ends = [(start, start + self.copies) for start in starts]
        return [self.codec.transcripts(found[a:b], rewards[a:b], self.step_baseline) for a, b in ends]
