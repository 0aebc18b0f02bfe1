"""Human labels: a sheet with one line for each candidate action of each state, to be filled in.

    {"example_id": "q17", "state": {...}, "action": "<search> Morn mayor</search>", "reward": null}

A reward is a number in [0, 1], or null while nobody has given one.
"""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jraggym.errors import InputError
from jraggym.labelling import Decision, RewardSource
from jraggym.retrieval.corpus import read_jsonl
from jraggym.sources.table import table_source
from jraggym.sources.wording import same_action
from jraggym.text.actions import format_action, parse_action
from jraggym.types import Action, Malformed, State, state_from_json, to_json

FIELDS = ("example_id", "state", "action", "reward")


def sheet(decisions: Iterable[Decision]) -> Iterator[str]:
    """The lines of an empty sheet: every distinct action of every decision; malformed ones are left out.

    So is a thought whose tags would keep the line from being read back, and an action whose own text has such tags.
    """
    for decision in decisions:
        for places in same_action(decision.actions):
            action = decision.actions[places[0]]
            if isinstance(action, Malformed):
                continue
            texts = map(format_action, (action, dataclasses.replace(action, thought="")))
            text = next((text for text in texts if parse_action(text) == action), None)
            if text is not None:
                values = (decision.example.id, to_json(decision.state), text, None)
                yield json.dumps(dict(zip(FIELDS, values, strict=True)), ensure_ascii=False)


def human_source(path: str | Path) -> RewardSource:
    """The labels of a filled-in sheet; what is not in it is unlabelled.

    Raises:
        InputError: for a sheet that nobody has filled in, or, naming the line, for a missing or unknown field, a state
            or an action of another shape, a reward outside [0, 1], or a second label for the same action.
    """
    table: dict[tuple[str, State], dict[Action, float | None]] = defaultdict(dict)
    for line, value in read_jsonl(path):
        try:
            example_id, state, action, reward = _label(value)
        except InputError as error:
            raise InputError(
                f"{path}, line {line} is no label", got=error, remedy="Start from an empty sheet."
            ) from error
        known = table[example_id, state]
        if action in known:
            remedy = "Keep one line for each action of a state."
            raise InputError(f"{path}, line {line} labels an action again", got=repr(value["action"]), remedy=remedy)
        known[action] = reward
    if table and all(reward is None for known in table.values() for reward in known.values()):
        remedy = "Put a number from 0 to 1 behind some rewards."
        raise InputError(f"{path} holds no label", got=f"{sum(map(len, table.values()))} lines", remedy=remedy)
    return table_source(table)


def _label(value: Mapping[str, Any]) -> tuple[str, State, Action, float | None]:
    if set(value) != set(FIELDS):
        remedy = f"A label has exactly the fields {', '.join(FIELDS)}."
        raise InputError("wrong fields", got=", ".join(sorted(value)) or "none", remedy=remedy)
    example_id, text, reward = value["example_id"], value["action"], value["reward"]
    if not isinstance(example_id, str) or not isinstance(text, str):
        raise InputError("example_id and action must be texts", got=(example_id, text), remedy="Quote them.")
    action = parse_action(text)
    if isinstance(action, Malformed):
        raise InputError("the action does not parse", got=action.reason, remedy="Leave the action as it was.")
    number = isinstance(reward, int | float) and not isinstance(reward, bool)
    if reward is not None and not (number and 0 <= reward <= 1):
        raise InputError("a reward must be a number in [0, 1] or null", got=repr(reward), remedy="Correct it.")
    return example_id, state_from_json(value["state"]), action, None if reward is None else float(reward)
