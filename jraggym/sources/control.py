"""The control: ranks that are dealt at random, so that whatever is learnt from them comes from elsewhere."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from jraggym.labelling import Decision, RewardSource, rank_rewards
from jraggym.sources.wording import same_action, wording


def random_source(seed: int) -> RewardSource:
    """Rewards 1 / (1 + rank) of a random ranking of the distinct actions.

    The ranking depends on (seed, example id, state, actions) and not on the order of the candidates.
    """

    def source(decisions: Sequence[Decision]) -> list[tuple[float | None, ...]]:
        return [_deal(seed, decision) for decision in decisions]

    return source


def _deal(seed: int, decision: Decision) -> tuple[float | None, ...]:
    places = same_action(decision.actions)
    rewards = rank_rewards([_draw(seed, decision, group[0]) for group in places])
    dealt: list[float | None] = [None] * len(decision.actions)
    for group, reward in zip(places, rewards, strict=True):
        for place in group:
            dealt[place] = reward
    return tuple(dealt)


def _draw(seed: int, decision: Decision, place: int) -> tuple[float, ...]:
    text = repr((seed, decision.example.id, decision.state, wording(decision.actions[place])))
    return tuple(map(float, hashlib.sha256(text.encode(errors="surrogatepass")).digest()[:8]))
