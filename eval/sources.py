"""Which labels make the better critic? One set of states, four sources of process rewards, one budget of training.

    python -m eval.sources --model runs/sft/model --seed 0 --out runs/sources0
    python -m eval.pooled --runs runs/sources0 runs/sources1 runs/sources2

The warm start of `python -m train.sft synthhop --seed N` runs its own episodes on questions it was not trained on, with
eight candidates at every state. All critics start from it and see the same states for the same number of steps, under
the same objective (order within a state, and height); only the labels differ. Each critic then picks among eight of
the warm start's samples on the test questions.

support    the rule-based judge     rollouts   mean outcome of four continuations of each candidate
outcome    the episode's outcome, for the executed candidate alone     random     ranks dealt at random

Written down before the runs: support > rollouts > outcome > random, each step by at least .02 EM with an interval
above 0, pooled over three seeds. About ten minutes a seed on two busy CPU cores.

Found, mean EM of seeds 0, 1, 2: rollouts .636, support .628, outcome .612, random .479 (greedy .464). So the last two
steps hold: rollouts - outcome +.024 (+.003 to +.043), outcome - random +.132 (+.105 to +.158); the rule-based judge and
roll-outs cannot be told apart (-.008, -.027 to +.010). The objective is one for all; the main job trains on the judge's
labels by pairs, and on more questions.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import tyro

from eval.agreement import Labels, agree
from jraggym.data.process import open_dataset
from jraggym.errors import exit_on_input_error
from jraggym.evaluation import Row
from jraggym.model_folder import Model
from jraggym.models.critic import Critic
from jraggym.porting.pretrained import open_model
from jraggym.preemption import preemptible
from jraggym.recipes.labelling import How, critic_of_any_labels, judged, label, source_of
from jraggym.recipes.quickstart import Workshop, collect_round, collector
from jraggym.recipes.rows import Agent, Evaluator
from jraggym.recipes.settings import Settings
from train.job import claim, prepare, write
from train.results import Console

NAMES = ("support", "rollouts", "outcome", "random")  # from best to worst, as expected
LEAST = 0.02


@dataclass(frozen=True)
class Arguments:
    """Trains critics on four sources of process rewards and compares what they pick."""

    model: Path = Path("runs/sft/model")
    """Folder of the warm start, trained with the same --seed."""
    out: Path = Path("runs/sources")
    """Folder of data, labels, checkpoints and scores.json; an unfinished job is continued."""
    seed: int = 0
    """Decides the world and every draw."""
    settings: Settings = field(default_factory=lambda: Settings(contrasts=8))
    """The world, the shapes of batches and rollouts, and the critics' budget."""
    how: How = field(default_factory=How)


def run(arguments: Arguments) -> dict[str, Any]:
    """Does all stages and writes scores.json (for eval.pooled) and results.json."""
    console, start = Console(), open_model(arguments.model, "actor")
    claim(arguments.out, {"experiment": "sources", **_plain(arguments)})
    settings = dataclasses.replace(arguments.settings, seed=arguments.seed, model=start.config)
    with console.stage("world and indexes"):
        shop = prepare(settings, "synthhop", None, arguments.out, console.progress, start.tokenizer)
    critics, labels = _critics(shop, start, arguments.how, console)
    rows = _rows(shop, start, critics, console)
    claims = [[better, worse, LEAST] for better, worse in itertools.pairwise(NAMES)]
    em = {name: row.em.tolist() for name, row in rows.items()}
    write(arguments.out / "scores.json", json.dumps({"seed": settings.seed, "em": em, "claims": claims}))
    summaries = {name: row.summary(settings.seed) for name, row in rows.items()}
    results = {"seed": settings.seed, "stages": console.stages, "labels": labels, "rows": summaries}
    write(arguments.out / "results.json", json.dumps(results, indent=1))
    return results


def _plain(arguments: Arguments) -> dict[str, Any]:
    return {key: value for key, value in dataclasses.asdict(arguments).items() if key != "out"}


def _critics(
    shop: Workshop, start: Model, how: How, console: Console
) -> tuple[dict[str, Critic], dict[str, dict[str, Any]]]:
    """A critic for each source, and how its labels agree with the rule-based ones."""
    settings, examples = shop.settings, shop.task.train.examples
    fresh = examples[settings.demonstrations :][: settings.collected]
    with console.stage("collect", f"{len(fresh)} questions"):
        collect_round(shop, "states", start.weights, fresh, collector(shop, "first"))
    data, critics, labels = open_dataset(shop.out / "data" / "states" / "dataset"), {}, {}
    support: Labels = []
    for name in NAMES:
        with console.stage(f"label, {name}"):
            records = label(shop, name, source_of(shop, name, data, start.weights, how), data)
        rewards = [tuple(candidate.reward for candidate in record.candidates) for record in records]
        support = support or rewards
        labels[name] = agree(records, rewards, support, settings.seed)["all"]
        with console.stage(f"critic, {name}"):
            critics[name] = critic_of_any_labels(shop, f"critic {name}", start.weights, judged(shop, records))
    return critics, labels


def _rows(shop: Workshop, start: Model, critics: dict[str, Critic], console: Console) -> dict[str, Row]:
    many, evaluator = "K samples", Evaluator(shop, shop.task.test, shop.test_retriever)
    agents = [
        Agent("greedy", "baseline", "the warm start", start.weights),
        Agent("random pick", "baseline", "any of the samples", start.weights, None, "random", many),
        *(Agent(name, "trained", "best of K", start.weights, critics[name], "score", many) for name in NAMES),
    ]
    total, rows = len(shop.task.test.examples), {}
    with console.stage("evaluation", f"{total} test questions for each row"):
        for agent in agents:
            report = partial(_report, console, agent.name, total)
            rows[agent.name] = evaluator.score(agent, evaluator.run(agent, report))
    return rows


def _report(console: Console, name: str, total: int, done: int) -> None:
    console.progress(name, done, total, None)


def main() -> None:
    with exit_on_input_error(), preemptible():
        results = run(tyro.cli(Arguments))
    for name, row in results["rows"].items():
        low, high = row["em_interval"]
        print(f"{name:12s} EM {row['em']:.3f} ({low:.3f} to {high:.3f}), {row['searches']:.2f} searches")
    for name, found in results["labels"].items():
        told = ", ".join(f"{key} {value:.3f}" for key, value in found.items() if isinstance(value, float))
        print(f"labels, {name} against support: {told}")


if __name__ == "__main__":
    main()
