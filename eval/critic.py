"""How good is a critic? Its order of pairs, its calibration, and the best of N by its scores, on labelled states.

    python -m eval.critic --model runs/critic/model --data runs/collect/data/data/dataset --out runs/critic/exam.json
    python -m eval.critic --model runs/critic/model --actor runs/sft/model --episodes 8

By default only the tenth of the questions that `train.critic` holds out of this data; `--questions all` takes the whole
of other data. Counted are pairs of distinct candidates of a state with different rewards. The best-of-N curve is exact:
the expected process reward of the candidate that the critic picks among N of the K samples of a state, drawn without
replacement; at N = 1 that is chance, and `oracle` picks by the label itself. With an --actor the test questions of the
embedded world are also answered by so many independent episodes each, of which the critic picks one: by the score of
its last step, or the mean or least score of its steps. (`eval.scaling` lets it pick every single step.) Some seconds on
one CPU core for 1,000 states of the embedded world, and some minutes for 3,200 episodes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import tyro

from jraggym.data.process import open_dataset
from jraggym.errors import InputError, exit_on_input_error
from jraggym.model_folder import Model
from jraggym.porting.pretrained import open_model
from jraggym.recipes.critic_exam import examine, score_records
from jraggym.recipes.offline import COLLECTED, held_out
from jraggym.recipes.settings import Settings
from jraggym.recipes.whole_episodes import episodes_best_of
from train.job import prepare, write
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
    seed: int = 0
    """Of the intervals and of the embedded world."""
    actor: Path | None = None
    """Folder of the actor of whole episodes; None: there are none."""
    episodes: int = 8
    """Of each test question."""
    settings: Settings = field(default_factory=Settings)
    """As in the critic's training: `max_turns` and `max_prompt` are its prompts', the rest is for whole episodes."""


def run(arguments: Arguments) -> dict[str, Any]:
    """Scores the states, and writes the figures where `out` is named."""
    model, console = open_model(arguments.model, "critic"), Console()
    records = list(open_dataset(arguments.data))
    if arguments.questions == "held-out":
        records = list(held_out(records)[1])
    with console.stage("scores"):
        scored = score_records(
            model,
            records,
            arguments.settings.max_turns,
            arguments.settings.max_prompt,
            report=lambda done: console.progress("scores", done, len(records), None),
        )
    found = examine(records, scored, arguments.seed)
    if arguments.actor is not None:
        found["episodes"] = _episodes(arguments, arguments.actor, model, console)
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        write(arguments.out, json.dumps(found, indent=1))
    return found


def _episodes(arguments: Arguments, folder: Path, critic: Model, console: Console) -> list[dict[str, Any]]:
    actor = open_model(folder, "actor")
    if actor.config != critic.config:
        raise InputError("actor and critic differ in size", got=folder, remedy="Name the critic's own actor.")
    settings = replace(arguments.settings, seed=arguments.seed, model=actor.config)
    shop = prepare(settings, "synthhop", None, arguments.model, console.progress, actor.tokenizer)
    total = arguments.episodes * len(shop.task.test.examples)
    with console.stage("episodes", f"{total}"):
        return episodes_best_of(
            shop,
            actor.weights,
            critic.weights,
            arguments.episodes,
            lambda done: console.progress("episodes", done, total, None),
        )


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
    if "episodes" in found:
        names = [name for name in found["episodes"][0] if name != "n"]
        lines += ["", f"| best of, whole episodes: EM | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for row in found.get("episodes", ()):
        cells = [f"{row[name]['em']:.3f} ({' to '.join(f'{x:.3f}' for x in row[name]['interval'])})" for name in names]
        lines.append(f"| {row['n']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    with exit_on_input_error():
        print(table(run(tyro.cli(Arguments, description=__doc__))))


if __name__ == "__main__":
    main()
