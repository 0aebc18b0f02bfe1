"""Training data of evidence search: states of simulated episodes, every proposal with its process reward.

The reward is the share of the missing supporting documents that a proposal's search would bring (`gains`); nobody but
this module looks at what a search that was not carried out would bring.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from flax import struct

from jraggym.errors import InputError
from jraggym.evidence.episodes import Budget, Lookup, complete, gains, search_evidence, unread
from jraggym.evidence.proposals import Proposal
from jraggym.models.bert_critic import PairTokenizer
from jraggym.types import Example, State

Array = np.ndarray


@dataclass(frozen=True, slots=True)
class Choice:
    """A question, why each proposal is made, and its process reward; `step` counts the turns before."""

    question: str
    whys: tuple[str, ...]
    rewards: tuple[float, ...]
    step: int


def choices_from_json(values: Any) -> list[Choice]:
    """Reads back a list of choices as dictionaries."""
    return [Choice(v["question"], tuple(v["whys"]), tuple(v["rewards"]), v["step"]) for v in values]


def shuffled(choices: Sequence[Choice], seed: int) -> list[Choice]:
    """The control: the rewards of each state dealt anew among its proposals."""
    rng = random.Random(seed)
    return [replace(choice, rewards=tuple(rng.sample(choice.rewards, len(choice.rewards)))) for choice in choices]


@struct.dataclass
class PairBatch:
    """K proposals at each of B states, as token ids of (question, why)."""

    ids: Array  # int32 [B, K, T]
    kinds: Array  # int8 [B, K, T]  1 in the question, 2 in the why, 0 for padding
    reward: Array  # f32 [B, K]
    candidate_mask: Array  # bool [B, K]


def collect_choices(
    examples: Sequence[Example],
    lookup: Lookup,
    budget: Budget,
    *,
    rounds: int = 2,
    good: float = 0.6,
    seed: int = 0,
    report: Callable[[int, int], None] | None = None,
) -> list[Choice]:
    """Labels all proposals of the states that episodes visit, `rounds` episodes of each question.

    An episode carries out random proposals, in every second round the first ones, and with probability `good` a good
    one before them, so that the critic sees good states and states gone astray. Kept are the states that have both good
    and useless proposals. Raises InputError when there is no such state.
    """
    choices: list[Choice] = []
    for number in range(rounds):
        rng, in_order = random.Random(f"{seed}/{number}"), number % 2 == 1

        def choose(states: Sequence[State], offered: Sequence[Sequence[Proposal]], rng=rng, in_order=in_order):
            queries = [proposal.query for proposals in offered for proposal in proposals]
            found = iter(lookup(queries, budget.read))
            orders = []
            for example, state, proposals in zip(examples, states, offered, strict=True):
                hits = [unread(state, next(found))[: budget.share] for _ in proposals]
                rewards = gains(example, state, hits)
                useful = [i for i, reward in enumerate(rewards) if reward > 0]
                if not complete(state, example) and 0 < len(useful) < len(rewards):
                    whys = tuple(proposal.why for proposal in proposals)
                    choices.append(Choice(state.question, whys, tuple(rewards), len(state.turns)))
                order = list(range(len(proposals)))
                if not in_order:
                    rng.shuffle(order)
                if useful and rng.random() < good:
                    order.insert(0, order.pop(order.index(rng.choice(useful))))
                orders.append(order)
            return orders

        search_evidence(examples, lookup, choose, budget)
        if report is not None:
            report(number + 1, rounds)
    if not choices:
        got = f"{len(examples)} questions"
        raise InputError(
            "there is nothing to choose in any state", got=got, remedy="Give questions over more documents."
        )
    return choices


@dataclass(frozen=True)
class PairBatches:
    """Batch `step` as a pure function of the step: `states` choices, at most `contrasts` proposals of each.

    The proposals of a state are up to `positives` good ones and random useless ones.
    """

    choices: Sequence[Choice]
    tokenize: PairTokenizer
    states: int = 8
    contrasts: int = 8
    positives: int = 2
    seed: int = 0

    def __getitem__(self, step: int) -> PairBatch:
        b, k = self.states, self.contrasts
        pairs = [[("", "")] * k for _ in range(b)]
        reward, mask = np.zeros((b, k), np.float32), np.zeros((b, k), bool)
        for row in range(b):
            turn, place = divmod(step * b + row, len(self.choices))
            order = np.random.default_rng((self.seed, turn)).permutation(len(self.choices))
            choice = self.choices[order[place]]
            picked = self._pick(choice, np.random.default_rng((self.seed, turn, place)))
            for column, i in enumerate(picked):
                pairs[row][column] = choice.question, choice.whys[i]
                reward[row, column], mask[row, column] = choice.rewards[i], True
        ids, kinds = self.tokenize([pair for row in pairs for pair in row])
        return PairBatch(ids.reshape(b, k, -1), kinds.reshape(b, k, -1), reward, mask)

    def _pick(self, choice: Choice, rng: np.random.Generator) -> list[int]:
        shuffled = [int(i) for i in rng.permutation(len(choice.rewards))]
        good = [i for i in shuffled if choice.rewards[i] > 0][: self.positives]
        return (good + [i for i in shuffled if choice.rewards[i] <= 0])[: self.contrasts]
