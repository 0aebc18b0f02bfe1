"""A chat model as the judge: it ranks the candidates of a state, and ranks become rewards (RAG-Gym, appendix E).

It sees the question, the history and what each candidate would do, not the reasoning behind it. Candidates are shown
in an order that is shuffled by a seed, equal ones once.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from jraggym.chat_model import ChatModel, Message, Reply, Request
from jraggym.errors import InputError
from jraggym.labelling import Decision, RewardSource
from jraggym.sources.wording import same_action, wording
from jraggym.types import Malformed, State, Turn
from jraggym.whole import write_whole

SYSTEM = """You compare the actions that a search agent could take next. Take the agent to know nothing by itself: \
what it says must rest on the history below. Judge by three criteria.

Sufficiency: an answer is in order only once the history holds everything it needs; then the right answer is the best \
action. While something is missing, a search for it is better than any answer.
Utility: a good query asks for one thing that is needed next, in precise words that a search engine can use. What \
later steps rest on comes first; a query about something not yet established is too early.
Redundancy: a query whose answer the history already holds, or which was asked before, is a waste.

Rank all actions from best to worst. Reply with a single JSON object in a ```json block, its only field \
"ranked_indices", a list that holds every index exactly once:
```json
{"ranked_indices": [2, 0, 1]}
```"""

_BLOCK = re.compile(r"```json\s*(.*?)```", re.DOTALL)


@dataclass
class Tally:
    """What a judge has done so far; `cost` in US dollars."""

    decisions: int = 0  # that had something to rank
    requests: int = 0
    unlabelled: int = 0  # decisions for which every request failed
    cost: float = 0.0
    faults: list[str] = field(default_factory=list)  # why, one for each failed request

    def __add__(self, other: Tally) -> Tally:
        return Tally(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


@dataclass(frozen=True)
class LlmJudge:
    """Rewards 1 / (1 + rank) by a chat model's ranking of the distinct actions.

    A failed ranking is asked for again in another order, up to `retries` times; then the whole decision is unlabelled
    and counted in `tally`. Malformed candidates are not shown and rank behind all actions; where there is only one
    action it ranks first unasked, and where there is none all are unlabelled. The judge sees the gold answer only with
    `show_gold`.
    """

    model: ChatModel
    seed: int = 0
    retries: int = 2
    show_gold: bool = False
    max_tokens: int = 1_024
    tally: Tally = field(default_factory=Tally, compare=False)

    def __call__(self, decisions: Sequence[Decision]) -> list[tuple[float | None, ...]]:
        """The rewards of all decisions; each attempt is one call of the model."""
        groups = [[g for g in same_action(d.actions) if not isinstance(d.actions[g[0]], Malformed)] for d in decisions]
        ranks = {i: list(range(len(shown))) for i, shown in enumerate(groups) if len(shown) == 1}
        waiting = [i for i, shown in enumerate(groups) if len(shown) > 1]
        self.tally.decisions += len(waiting)
        for attempt in range(1 + self.retries):
            orders = {i: self._order(decisions[i], len(groups[i]), attempt) for i in waiting}
            requests = [self._request(decisions[i], [groups[i][j][0] for j in orders[i]], attempt) for i in waiting]
            for i, reply in zip(waiting, self.model(requests) if requests else (), strict=True):
                self.tally.requests += 1
                self.tally.cost += reply.cost
                try:
                    ranking = _read(reply, len(groups[i]))
                except InputError as error:
                    self.tally.faults.append(str(error))
                else:
                    ranks[i] = [orders[i][place] for place in ranking]
            waiting = [i for i in waiting if i not in ranks]
        self.tally.unlabelled += len(waiting)
        return [_rewards(d, groups[i], ranks.get(i)) for i, d in enumerate(decisions)]

    def _order(self, decision: Decision, size: int, attempt: int) -> list[int]:
        order = list(range(size))
        random.Random(repr((self.seed, attempt, decision.example.id, decision.state))).shuffle(order)
        return order

    def _request(self, decision: Decision, places: Sequence[int], attempt: int) -> Request:
        lines = [f"[{number}] {wording(decision.actions[place])}" for number, place in enumerate(places)]
        parts = [f"### Question\n{decision.state.question}", f"### History\n{_history(decision.state)}"]
        if self.show_gold:
            parts.append(f"### Right answer (not known to the agent)\n{' or '.join(decision.example.answers)}")
        parts.append("### Actions\n" + "\n".join(lines))
        messages = Message("system", SYSTEM), Message("user", "\n\n".join(parts))
        return Request(messages, max_tokens=self.max_tokens, seed=self.seed + attempt)


def tallied(judge: LlmJudge, path: Path) -> RewardSource:
    """The judge, with a tally of each call in the JSON file `path`, which outlives a kill; see `read_tally`.

    A call that is repeated, since a kill has lost what it found, counts once.
    """

    def source(decisions: Sequence[Decision]) -> list[tuple[float | None, ...]]:
        part = replace(judge, tally=Tally())
        rewards = part(decisions)
        if decisions:
            asked = " ".join(f"{d.example.id}/{len(d.state.turns)}" for d in decisions)
            write_whole(path, json.dumps({**_tallies(path), asked: asdict(part.tally)}, indent=1))
        return rewards

    return source


def read_tally(path: Path) -> Tally:
    """All calls of a `tallied` judge together; raises InputError where the file holds something else."""
    return sum((Tally(**tally) for tally in _tallies(path).values()), Tally())


def _tallies(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text()) if path.exists() else {}
        [Tally(**tally) for tally in found.values()]
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is no tally of a judge", got=error, remedy="Remove it.") from error
    return found


def parse_ranking(text: str, size: int) -> list[int]:
    """The ranking in a judge's reply, best first.

    Raises InputError unless there is exactly one ```json block, and in it one object whose only field `ranked_indices`
    is a permutation of 0 .. size - 1.
    """
    remedy = f"Write one ```json block with a permutation of 0 to {size - 1} as ranked_indices."
    blocks = _BLOCK.findall(text)
    if len(blocks) != 1:
        raise InputError("a ranking stands in one json block", got=f"{len(blocks)} blocks", remedy=remedy)
    try:
        value = json.loads(blocks[0], object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise InputError("the ranking is not JSON", got=error, remedy=remedy) from error
    ranking = value["ranked_indices"] if isinstance(value, dict) and set(value) == {"ranked_indices"} else None
    if not isinstance(ranking, list):
        raise InputError("a ranking has the one field ranked_indices", got=value, remedy=remedy)
    whole = all(type(place) is int for place in ranking)
    if not whole or sorted(ranking) != list(range(size)):
        raise InputError("the ranking is no permutation", got=ranking, remedy=remedy)
    return ranking


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a field stands twice")
    return dict(pairs)


def _read(reply: Reply, size: int) -> list[int]:
    if reply.error is not None or not reply.completions:
        raise InputError("the judge gave no reply", got=reply.error or "nothing", remedy="Ask again.")
    return parse_ranking(reply.completions[0].text, size)


def _rewards(decision: Decision, groups: Sequence[Sequence[int]], ranking: Sequence[int] | None) -> tuple:
    if ranking is None:
        return (None,) * len(decision.actions)
    rewards = [1.0 / (1 + len(groups))] * len(decision.actions)  # what is not among the groups is malformed
    for rank, group in enumerate(ranking):
        for place in groups[group]:
            rewards[place] = 1.0 / (1 + rank)
    return tuple(rewards)


def _history(state: State) -> str:
    return "\n\n".join(map(_turn, state.turns)) or "Nothing was searched yet."


def _turn(turn: Turn) -> str:
    if turn.digest is not None:
        found = turn.digest
    else:
        found = "\n".join(f"({d.title}) {d.text}" for d in turn.documents) or "Nothing was found."
    return f"{wording(turn.action)}\n{found}"
