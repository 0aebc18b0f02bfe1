"""Finished episodes on disk, a line each, so that what a model was paid for outlives a kill.

    {"example": {...}, "costs": {...}, "final": {...}, "steps": [{"turns": 0, "candidates": [...], "chosen": 3}, ...]}

A step's state is the final one cut to so many turns, and is written as that number: with it whole, every document would
be written once for each later step.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jraggym.agents.episode import Episode, episode_from_json
from jraggym.errors import InputError
from jraggym.types import Example, State, example_from_json, to_json


class EpisodeLog:
    """A file of episodes that grows by one line when one ends; a last line that a kill has cut off is taken out."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def add(self, example: Example, episode: Episode) -> None:
        """Appends an episode; it is with the operating system when this returns."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="ascii") as file:  # JSON's escapes hold any text, lone surrogates included
            file.write(json.dumps(_packed(example, episode)) + "\n")

    def read(self) -> Iterator[tuple[Example, Episode]]:
        """The whole lines in their order; raises InputError, naming the line, for anything else."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    return
                try:
                    yield _unpacked(json.loads(line))
                except (ValueError, KeyError, TypeError) as error:  # an InputError is a ValueError
                    remedy = "Remove that line, and its question is asked again."
                    raise InputError(f"line {number} of {self.path} is no episode", got=error, remedy=remedy) from error

    def resume(self, examples: Sequence[Example]) -> dict[str, Episode]:
        """The episodes of these examples by id, after the cut-off line was taken out.

        Raises InputError when the file holds an example twice, or one that is not among them as it stands.
        """
        if self.path.exists():
            content = self.path.read_bytes()
            if (whole := content.rfind(b"\n") + 1) < len(content):
                with self.path.open("rb+") as file:
                    file.truncate(whole)
        asked, found = {example.id: example for example in examples}, dict[str, Episode]()
        for example, episode in self.read():
            if example.id in found or asked.get(example.id) != example:
                got = f"{example.id!r} {'twice' if example.id in found else 'is another question now'}"
                raise InputError(f"{self.path} holds other episodes", got=got, remedy="Name another folder.")
            found[example.id] = episode
        return found


def _packed(example: Example, episode: Episode) -> dict[str, Any]:
    final, steps = episode.trajectory.final, []
    for step in episode.trajectory.steps:
        if step.state != _cut(final, len(step.state.turns)):
            raise ValueError(f"a step of {example.id!r} is no beginning of its episode")
        candidates = to_json(step.candidates)
        steps.append({"turns": len(step.state.turns), "candidates": candidates, "chosen": step.chosen})
    costs = dataclasses.asdict(episode.costs)
    return {"example": to_json(example), "costs": costs, "final": to_json(final), "steps": steps}


def _unpacked(value: Mapping[str, Any]) -> tuple[Example, Episode]:
    example, final = example_from_json(value["example"]), value["final"]
    steps = [
        {
            "state": {"question": final["question"], "turns": final["turns"][: step["turns"]]},
            "candidates": step["candidates"],
            "chosen": step["chosen"],
        }
        for step in value["steps"]
    ]
    trajectory = {"example_id": example.id, "steps": steps, "final": final}
    return example, episode_from_json({"trajectory": trajectory, "costs": value["costs"]})


def _cut(final: State, turns: int) -> State:
    return State(final.question, final.turns[:turns])
