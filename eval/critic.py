"""How good is a critic? Its order of pairs, its calibration, and the best of N by its scores, on labelled states.

    python -m eval.critic --model runs/critic/model --data runs/collect/data/data/dataset --out runs/critic/exam.json

By default only the tenth of the questions that `train.critic` holds out of this data; `--questions all` takes the whole
of other data. Counted are pairs of distinct candidates of a state with different rewards. The best-of-N curve is exact:
the expected process reward of the candidate that the critic picks among N of the K samples of a state, drawn without
replacement; at N = 1 that is chance, and `oracle` picks by the label itself. What whole episodes gain from more
candidates is the second curve of `eval.scaling`. Some seconds on one CPU core for 1,000 states of the embedded world.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from jraggym.data.process import open_dataset
from jraggym.errors import exit_on_input_error
from jraggym.porting.pretrained import open_model
from jraggym.recipes.critic_exam import examine, score_records
from jraggym.recipes.offline import COLLECTED, held_out
from jraggym.recipes.settings import Settings
from train.job import write
from train.results import Console


@dataclass(frozen=True)
class Arguments:
    """Examines a critic on labelled process data."""

    model: Path = Path("runs/critic/model")
    """Folder of the critic."""
    data: Path = COLLECTED
    """Dataset of train.collect or train.label."""
    questions: Literal["held-out", "all"] = "held-out"
    """The tenth that train.critic does not learn from, or all."""
    out: Path | None = None
    """A json file with all figures."""
    max_turns: int = Settings.max_turns
    """As in the critic's training."""
    max_prompt: int = Settings.max_prompt
    """As in the critic's training, in tokens."""
    seed: int = 0
    """Of the intervals."""


def run(arguments: Arguments) -> dict[str, Any]:
    """Scores the states, and writes the figures where `out` is named."""
    model, console = open_model(arguments.model, "critic"), Console()
    records = list(open_dataset(arguments.data))
    if arguments.questions == "held-out":
        records = held_out(records)[1]
    with console.stage("scores"):
        scored = score_records(
            model,
            records,
            arguments.max_turns,
            arguments.max_prompt,
            report=lambda done: console.progress("scores", done, len(records), None),
        )
    found = examine(records, scored, arguments.seed)
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        write(arguments.out, json.dumps(found, indent=1))
    return found


def table(found: dict[str, Any]) -> str:
    """The figures as text."""
    low, high = found["accuracy_interval"]
    lines = [
        f"{found['states']} states of {found['questions']} questions, {found['pairs']} pairs",
        f"pair accuracy {found['accuracy']:.3f} ({low:.3f} to {high:.3f})",
        "by rank distance: " + ", ".join(f"{d}: {share:.3f}" for d, share in found["by_distance"].items()),
        f"expected calibration error {found['calibration_error']:.3f}",
        *("", "| confidence | pairs | mean confidence | share right |", "|---" * 4 + "|"),
    ]
    for row in found["reliability"]:
        lines.append(
            f"| {row['from']:.2f} to {row['to']:.2f} | {row['pairs']} | {row['confidence']:.3f} | {row['right']:.3f} |"
        )
    lines += ["", "| best of | reward, critic | 95 % interval | oracle | good, critic | oracle |", "|---" * 6 + "|"]
    for row in found["best_of"]:
        critic, oracle = row["critic"], row["oracle"]
        span = " to ".join(f"{x:.3f}" for x in critic["interval"])
        lines.append(
            f"| {row['n']} | {critic['reward']:.3f} | {span} | {oracle['reward']:.3f} | {critic['good']:.3f} "
            f"| {oracle['good']:.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    with exit_on_input_error():
        print(table(run(tyro.cli(Arguments, description=__doc__))))


if __name__ == "__main__":
    main()
