"""The main job: python -m train.quickstart [--out DIR] [--seed N] [--dataset hotpotqa --data-dir DIR]

Trains a search agent end to end on a CPU and says what each part gained: see jraggym/recipes/quickstart.py for
the stages and configs/quickstart.py for the settings. Called again with the same --out it goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import numpy as np
import tyro

from configs.quickstart import PRESETS
from eval.report import write_report
from jraggym.errors import InputError, exit_on_input_error
from jraggym.evaluation import Row
from jraggym.models.bert import BertEncoder, minilm_path
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
    train_tokenizer,
    warm_longer,
    warm_start,
)
from jraggym.recipes.rows import Evaluator, Models, agents
from jraggym.recipes.settings import Settings
from jraggym.recipes.task import Split, Task, hotpotqa_task, synthhop_task
from jraggym.retrieval.encoder import TfidfEncoder, embed
from jraggym.retrieval.hybrid import HybridRetriever
from jraggym.types import Trajectory, to_json, trajectory_from_json
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
    with exit_on_input_error():
        run(tyro.cli(Arguments))


def run(arguments: Arguments) -> None:
    """Does all stages and writes results.json and report.html."""
    console = Console()
    settings = _settings(arguments)
    _quiet()
    _claim(arguments, settings)
    shop = _prepare(arguments, settings, console)
    models, records = _train(shop, console)
    rows, runs = _evaluate(shop, models, console)
    results = gather(shop, console, rows, runs, records)
    _write(arguments.out / "results.json", json.dumps(results, indent=1))
    _write(arguments.out / "scores.json", json.dumps(scores(rows, settings)))
    write_report(results, arguments.out / "report.html")
    show(results, arguments.out)


def _settings(arguments: Arguments) -> Settings:
    if arguments.dataset not in PRESETS:
        raise InputError("unknown dataset", got=repr(arguments.dataset), remedy=f"Use one of {', '.join(PRESETS)}.")
    if arguments.dataset == "hotpotqa" and arguments.data_dir is None:
        raise InputError("hotpotqa needs its files", got="no --data-dir", remedy="Add --data-dir FOLDER.")
    settings = dataclasses.replace(PRESETS[arguments.dataset], seed=arguments.seed)
    return settings.smoke() if arguments.smoke else settings


def _quiet() -> None:
    logging.disable(logging.INFO)


def _claim(arguments: Arguments, settings: Settings) -> None:
    """Makes sure that `out` is new or belongs to the same job; keeps compiled programs there."""
    job = {"dataset": arguments.dataset, "settings": json.loads(json.dumps(settings.fingerprint()))}
    path = arguments.out / "job.json"
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
        if path.exists():
            if json.loads(path.read_text()) != job:
                raise InputError(
                    f"{arguments.out} holds a job of other settings", got=path, remedy="Name another --out folder."
                )
        else:
            _write(path, json.dumps(job, indent=1))
    except (OSError, json.JSONDecodeError) as error:
        raise InputError(f"cannot use {arguments.out}", got=error, remedy="Name another --out folder.") from error
    if getattr(jax.config, "jax_compilation_cache_dir", None) is None:
        jax.config.update("jax_compilation_cache_dir", str((arguments.out / "compiled").resolve()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _write(path: Path, text: str) -> None:
    scratch = path.with_name(path.name + ".tmp")
    scratch.write_text(text)
    os.replace(scratch, path)


def _prepare(arguments: Arguments, settings: Settings, console: Console) -> Workshop:
    with console.stage("world, indexes and tokenizer", arguments.dataset):
        sizes = {
            "train": settings.demonstrations + 2 * settings.collected,
            "development": settings.development,
            "test": settings.test,
        }
        if arguments.dataset == "synthhop":
            task = synthhop_task(settings.seed, **sizes)
        else:
            assert arguments.data_dir is not None
            task = hotpotqa_task(arguments.data_dir, **sizes)
        train, test = (_retriever(split, task, settings, console, arguments.out) for split in (task.train, task.test))
        tokenizer = train_tokenizer(task, settings)
        _write_bytes(arguments.out / "tokenizer.model", tokenizer.model)
    return Workshop(settings, task, train, test, tokenizer, arguments.out, console.progress)


def _write_bytes(path: Path, content: bytes) -> None:
    scratch = path.with_name(path.name + ".tmp")
    scratch.write_bytes(content)
    os.replace(scratch, path)


def _retriever(split: Split, task: Task, settings: Settings, console: Console, out: Path) -> HybridRetriever:
    if task.name == "synthhop":
        return HybridRetriever(
            split.corpus, TfidfEncoder.fit(split.corpus.texts(), dim=settings.vector), k=settings.documents
        )
    encoder = BertEncoder.load(minilm_path())
    texts, kept = split.corpus.texts(), out / f"vectors-{split.corpus.fingerprint}.npy"
    if not kept.exists():
        vectors = embed(encoder, texts, progress=partial(_report, console, "embed", len(texts)))
        _save_vectors(kept, vectors)
    return HybridRetriever(split.corpus, encoder, k=settings.documents, vectors=np.load(kept))


def _save_vectors(path: Path, vectors: np.ndarray) -> None:
    scratch = path.with_name(path.stem + ".tmp.npy")
    np.save(scratch, vectors)
    os.replace(scratch, path)


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
                _write(path, "".join(json.dumps(to_json(t)) + "\n" for t in found))
            runs[agent.name] = [trajectory_from_json(json.loads(line)) for line in path.read_text().splitlines()]
            rows[agent.name] = evaluator.score(agent, runs[agent.name])
        rows["oracle"] = evaluator.oracle()
    return rows, runs


if __name__ == "__main__":
    main()
