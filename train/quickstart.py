"""The main job: python -m train.quickstart [--out DIR] [--seed N] [--dataset hotpotqa --data-dir DIR]

Trains a search agent end to end on a CPU and says what each part gained: see jraggym/recipes/quickstart.py for
the stages and configs/quickstart.py for the settings. Called again with the same --out it goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import tyro

from configs.quickstart import PRESETS
from eval.report import write_report
from jraggym.errors import InputError, exit_on_input_error
from jraggym.evaluation import Row
from jraggym.preemption import preemptible
from jraggym.recipes.quickstart import (
    Workshop,
    collect_round,
    collector,
    demonstrations,
    imitate,
    labelled,
    optimise_preferences,
    successful,
    train_critic,
    warm_longer,
    warm_start,
)
from jraggym.recipes.rows import Evaluator, Models, agents
from jraggym.recipes.settings import Settings
from jraggym.types import Trajectory, to_json, trajectory_from_json
from train.job import claim, prepare, write
from train.results import Console, gather, scores, show


@dataclass(frozen=True)
class Arguments:
    """Trains a search agent from process supervision on a CPU and measures what each part gains."""

    out: Path = Path("runs/quickstart")
    """Folder of checkpoints, process data, results.json and report.html; an unfinished one is continued."""
    seed: int = 0
    """Decides the world, the initial weights and every draw."""
    dataset: str = "synthhop"
    """synthhop (made up, embedded) or hotpotqa (needs --data-dir and the `offline` extra)."""
    data_dir: Path | None = None
    """Folder with the official HotpotQA json files."""
    smoke: bool = False
    """A few steps of everything: shows in a minute or two that it runs; its numbers mean nothing."""


def main() -> None:
    with exit_on_input_error(), preemptible():
        run(tyro.cli(Arguments))


def run(arguments: Arguments) -> None:
    """Does all stages and writes results.json and report.html."""
    console = Console()
    settings = _settings(arguments)
    claim(arguments.out, {"dataset": arguments.dataset, "settings": settings.fingerprint()})
    with console.stage("world, indexes and tokenizer", arguments.dataset):
        shop = prepare(settings, arguments.dataset, arguments.data_dir, arguments.out, console.progress)
    models, records = _train(shop, console)
    rows, runs = _evaluate(shop, models, console)
    results = gather(shop, console, rows, runs, records)
    write(arguments.out / "results.json", json.dumps(results, indent=1))
    write(arguments.out / "scores.json", json.dumps(scores(rows, settings)))
    write_report(results, arguments.out / "report.html")
    show(results, arguments.out)


def _settings(arguments: Arguments) -> Settings:
    if arguments.dataset not in PRESETS:
        raise InputError("unknown dataset", got=repr(arguments.dataset), remedy=f"Use one of {', '.join(PRESETS)}.")
    if arguments.dataset == "hotpotqa" and arguments.data_dir is None:
        raise InputError("hotpotqa needs its files", got="no --data-dir", remedy="Add --data-dir FOLDER.")
    settings = dataclasses.replace(PRESETS[arguments.dataset], seed=arguments.seed)
    return settings.smoke() if arguments.smoke else settings


def _report(console: Console, name: str, total: int, done: int) -> None:
    console.progress(name, done, total, None)


def _train(shop: Workshop, console: Console) -> tuple[Models, list]:
    """All training stages; each is skipped or continued if `out` already holds it or a part of it."""
    settings, examples = shop.settings, shop.task.train.examples
    first, second = (examples[i:][: settings.collected] for i in _starts(settings, len(examples)))
    with console.stage("warm start", "SFT from scratch on imperfect demonstrations"):
        demonstrated = demonstrations(shop)
        warm = warm_start(shop, demonstrated)
    rollout = collector(shop)
    with console.stage("collect, warm start", f"{len(first)} questions, {settings.candidates} candidates a state"):
        records = collect_round(shop, "warm-start", warm, first, rollout)
    data, shuffled = (labelled(shop, successful(records), shuffle=deal) for deal in (False, True))
    with console.stage("actors", "SFT on good actions, DPO, and their controls"):
        longer = warm_longer(shop, warm, demonstrated)
        imitation = imitate(shop, warm, data)
        dpo = optimise_preferences(shop, "DPO", warm, data)
        dpo_shuffled = optimise_preferences(shop, "DPO shuffled", warm, shuffled)
    with console.stage("collect, DPO", f"{len(second)} questions, {settings.candidates} candidates a state"):
        more = collect_round(shop, "dpo", dpo, second, rollout)
    with console.stage("critics", "Bradley-Terry over the candidates of a state, and its control"):
        critic = train_critic(shop, "critic", warm, records + more)
        critic_shuffled = train_critic(shop, "critic shuffled", warm, records + more, shuffle=True)
    return Models(warm, longer, imitation, dpo, dpo_shuffled, critic, critic_shuffled), records + more


def _starts(settings: Settings, number: int) -> tuple[int, int]:
    """Where the two rounds' questions start: behind the demonstrations, or among them if there are too few."""
    fresh = settings.demonstrations + 2 * settings.collected <= number
    start = settings.demonstrations if fresh else 0
    return start, start + settings.collected


def _evaluate(
    shop: Workshop, models: Models, console: Console
) -> tuple[dict[str, Row], dict[str, Sequence[Trajectory]]]:
    """The rows, and the episodes behind them, kept in `out`/eval."""
    evaluator = Evaluator(shop, shop.task.test, shop.test_retriever)
    folder = shop.out / "eval"
    folder.mkdir(exist_ok=True)
    rows: dict[str, Row] = {}
    runs: dict[str, Sequence[Trajectory]] = {}
    total = len(shop.task.test.examples)
    with console.stage("evaluation", f"{total} test questions for each row"):
        for agent in agents(shop, models):
            path = folder / f"{agent.name.replace(' ', '-').replace(',', '').replace('+', 'and')}.jsonl"
            if not path.exists():
                found = evaluator.run(agent, partial(_report, console, agent.name, total))
                write(path, "".join(json.dumps(to_json(t)) + "\n" for t in found))
            runs[agent.name] = [trajectory_from_json(json.loads(line)) for line in path.read_text().splitlines()]
            rows[agent.name] = evaluator.score(agent, runs[agent.name])
        rows["oracle"] = evaluator.oracle()
    return rows, runs


if __name__ == "__main__":
    main()
