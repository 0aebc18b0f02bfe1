"""What an episode of an agent leaves behind: its trajectory and its costs, with JSON in and out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from jraggym.errors import InputError
from jraggym.types import Trajectory, trajectory_from_json


@dataclass(frozen=True, slots=True)
class Costs:
    """What an episode took; tokens and dollars are those of the actor and of the summariser together."""

    calls: int = 0  # of the actor, each for K candidates
    candidates: int = 0
    malformed: int = 0  # candidates that are no action
    errors: int = 0  # calls of the actor that failed
    searches: int = 0  # executed
    digests: int = 0  # calls of the summariser, as though no digest had been made before
    prompt_tokens: int = 0
    tokens: int = 0  # generated
    dollars: float = 0.0

    def plus(self, **more: float) -> Costs:
        """The costs with `more` of some."""
        return replace(self, **{name: getattr(self, name) + amount for name, amount in more.items()})


@dataclass(frozen=True, slots=True)
class Episode:
    """A finished episode. Its steps are what the model decided: a search that needs no model is only a turn."""

    trajectory: Trajectory
    costs: Costs


def episode_from_json(value: Any) -> Episode:
    """Reads what `types.to_json` writes of an episode; raises InputError for anything else."""
    if not isinstance(value, Mapping) or set(value) != {"trajectory", "costs"}:
        raise InputError("no episode", got=repr(value)[:80], remedy="Name a file of finished episodes.")
    costs, known = value["costs"], {f.name for f in fields(Costs)}
    if not isinstance(costs, Mapping) or set(costs) != known:
        raise InputError("the costs of an episode are not what they should be", got=costs, remedy="Run it again.")
    return Episode(trajectory_from_json(value["trajectory"]), Costs(**costs))
