"""Labelling collected data by any source of process rewards, and critics that learn from such labels."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from jraggym import steps
from jraggym.chats.connection import Server
from jraggym.chats.opening import ChatSpec, open_chat
from jraggym.data.lazy import Items
from jraggym.data.process import ChunkStore, ProcessRecord, ProcessSource, build_dataset, open_dataset
from jraggym.episodes import Rules
from jraggym.errors import InputError
from jraggym.labelling import RewardSource
from jraggym.model_folder import Model
from jraggym.models.critic import Critic, critic_specs
from jraggym.models.decoder import Decoder, init
from jraggym.recipes.bench import Bench, record_row, stored_rows, usable
from jraggym.recipes.experiment import Experiment, Log
from jraggym.recipes.quickstart import Workshop, shuffled
from jraggym.rollout import Policy, Rollout
from jraggym.sampling import Sampling
from jraggym.sources.control import random_source
from jraggym.sources.human import human_source, sheet
from jraggym.sources.llm_judge import LlmJudge, read_tally, tallied
from jraggym.sources.outcome import outcome_source
from jraggym.sources.relabel import Decide, bare_decisions, decisions, relabel
from jraggym.sources.rollouts import policy_rollouts
from jraggym.sources.support import support_source
from jraggym.text.batching import Row
from jraggym.training import Run
from jraggym.whole import write_whole

SOURCES = ("support", "llm", "rollouts", "outcome", "random", "human")
FAULTS = 5  # of a judge that are shown


@dataclass(frozen=True)
class How:
    """What the sources that need something are given."""

    continuations: int = 4
    """Episodes from the state after each candidate (rollouts)."""
    metric: str = "em"
    """Outcome of an episode: em or f1 (rollouts, outcome)."""
    sheet: Path | None = None
    """The jsonl file with the labels; where there is none, an empty one is written to be filled in (human)."""
    judge: ChatSpec = field(default_factory=lambda: Server("gpt-4o"))
    """The chat model that ranks: a server, or a model on this machine (llm)."""
    actor: ChatSpec = field(default_factory=lambda: Server("gpt-4o-mini"))
    """The chat model that goes on from an agent's candidates (rollouts, of agents)."""
    retries: int = 2
    """A failed ranking is asked for so often again, and is then unlabelled (llm)."""
    show_gold: bool = False
    """Show the judge the gold answer (llm)."""


@dataclass(frozen=True)
class Label(Experiment):
    """Puts another source's process rewards on collected data."""

    model: Path = Path("runs/sft/model")
    """The actor: continues the roll-outs."""
    data: Path = Path("runs/collect/data/data/dataset")
    """Dataset of train.collect, in the world of the same seed and settings."""
    rewards: str = "rollouts"
    """support, llm, rollouts, outcome, random or human; see jraggym/sources."""
    how: How = field(default_factory=How)

    @property
    def title(self) -> str:
        return f"{super().title}, {self.rewards} rewards"


def label_data(experiment: Label, shop: Workshop, start: Model, log: Log) -> tuple[None, dict[str, Any]]:
    """Writes `out`/labels/REWARDS and returns what is in it. Raises InputError on several processes."""
    if jax.process_count() > 1:
        got = f"{jax.process_count()} processes"
        raise InputError("labelling runs in one process", got=got, remedy="Start it on one machine, without --hosts.")
    data = open_dataset(experiment.data)
    source = source_of(shop, experiment.rewards, data, start.weights, experiment.how)
    labelled = label(shop, experiment.rewards, source, data, labels_basis(experiment.rewards, experiment.how))
    found = found_labels(labelled, _folder(shop, experiment.rewards), experiment.rewards)
    log("label", 0, {key: value for key, value in found.items() if isinstance(value, float | int)})
    return None, found


def found_labels(records: Iterable[ProcessRecord], folder: Path, name: str) -> dict[str, Any]:
    """What a labelling has found, and what its judge was asked."""
    rewards = [candidate.reward for record in records for candidate in record.candidates]
    known = [reward for reward in rewards if reward is not None]
    found: dict[str, Any] = {
        "candidates": len(rewards),
        "labelled": len(known),
        "reward": sum(known) / max(len(known), 1),
        "data": str(folder / "dataset"),
    }
    return {**found, "judge": judge_summary(folder)} if name == "llm" else found


def source_of(shop: Workshop, name: str, records: Iterable[ProcessRecord], actor: Decoder, how: How) -> RewardSource:
    """The named source for these records; raises InputError as `worldless_source` does."""
    if name == "support":
        return support_source(shop.task.judge)
    if name == "rollouts":
        return policy_rollouts(
            continuing(shop), Policy(shop.config, actor), shop.key(name), how.continuations, how.metric
        )
    return worldless_source(name, records, how, shop.settings.seed, _folder(shop, name))


def worldless_source(
    name: str, records: Iterable[ProcessRecord], how: How, seed: int, folder: Path, decide: Decide = bare_decisions
) -> RewardSource:
    """The named source of those that need no world; what a judge was asked is kept in `folder`.

    Raises InputError for an unknown name, for human labels without a sheet, and where the sheet has just been written.
    """
    if name == "outcome":
        return outcome_source(records, how.metric, decide)
    if name == "random":
        return random_source(seed)
    if name == "llm":
        return open_judge(how, folder, seed)
    if name != "human":
        raise InputError("unknown source of rewards", got=repr(name), remedy=f"Use one of {', '.join(SOURCES)}.")
    if how.sheet is None:
        raise InputError("human labels stand in a file", got="none", remedy="Name it with --how.sheet.")
    if not how.sheet.exists():
        lines = [line + "\n" for record in records for line in sheet(decide([record]))]
        if not lines:
            raise InputError("there is no action to label", got="malformed ones", remedy="Collect with another actor.")
        try:
            write_whole(how.sheet, "".join(lines))
        except OSError as error:
            raise InputError(f"cannot write {how.sheet}", got=error, remedy="Name another file.") from error
        remedy = "Put a number from 0 to 1, or null, behind each reward, and give the same command again."
        raise InputError(f"{how.sheet} is to be filled in", got=f"{len(lines)} actions without labels", remedy=remedy)
    return human_source(how.sheet)


def open_judge(how: How, folder: Path, seed: int) -> RewardSource:
    """The chat model as a judge; its tallies, and the answers that were paid for, are kept in `folder`."""
    model = open_chat(how.judge, folder / "answers.sqlite")
    return tallied(LlmJudge(model, seed, how.retries, how.show_gold), folder / "tally.json")


def judge_summary(folder: Path) -> dict[str, Any]:
    """What the judge of `open_judge` has done, over all runs of the job."""
    tally = read_tally(folder / "tally.json")
    return {
        "decisions": tally.decisions,
        "requests": tally.requests,
        "unlabelled": tally.unlabelled,
        "dollars": tally.cost,
        "failed": len(tally.faults),
        "faults": tally.faults[:FAULTS],
    }


def continuing(shop: Workshop) -> Rollout:
    """The rollout of Monte-Carlo continuations: the policy's own episodes, one action a turn."""
    settings = shop.settings
    sampling = Sampling(1, settings.max_action, settings.temperature)
    rules = Rules(settings.max_turns, seed=settings.seed)
    return Rollout(shop.config, shop.codec, shop.train_retriever, sampling, rules, batch=2 * settings.episodes)


def labels_basis(name: str, how: How) -> dict[str, str]:
    """What a source's labels depend on beside the records and settings: the sheet that people have filled in."""
    if name != "human" or how.sheet is None:
        return {}
    return {"sheet": hashlib.sha256(how.sheet.read_bytes()).hexdigest()}


def label(
    shop: Workshop, name: str, source: RewardSource, data: ProcessSource, basis: Mapping[str, str] | None = None
) -> list[ProcessRecord]:
    """The records under the source's labels, stored as a dataset under `out`/labels/`name`; resumable."""
    examples = {example.id: example for example in shop.task.train.examples}
    count = len({record.example_id for record in data})
    settings = {"source": name, "records": data.digest, "settings": shop.settings.fingerprint(), **(basis or {})}
    records = relabel(
        data,
        source,
        ChunkStore(_folder(shop, name) / "chunks", settings),
        name=name,
        decide=functools.partial(
            decisions, examples=examples, retriever=shop.train_retriever, max_turns=shop.settings.max_turns
        ),
        report=lambda done: shop.progress(f"label, {name}", done, count, None),
    )
    return list(build_dataset(_folder(shop, name) / "dataset", records))


def _folder(shop: Workshop, name: str) -> Path:
    return shop.out / "labels" / name


def judged(shop: Bench, records: Items[ProcessRecord]) -> Items[Row]:
    """Every state with a labelled candidate, with its distinct labelled candidates, at most `contrasts` of them.

    Unlabelled candidates are left out, and no label is read as good or bad: any source's rewards will do.
    """
    rows = stored_rows(records, functools.partial(_row, shop))
    if not rows:
        raise InputError("no state has a labelled candidate", got="0 rows", remedy="Choose another source.")
    return rows


def _row(shop: Bench, record: ProcessRecord) -> Row | None:
    labels = {c.text: c.reward for c in usable(shop, record) if c.reward is not None}
    texts = list(labels)[: shop.settings.contrasts]
    return record_row(shop.codec, record, texts, [labels[text] for text in texts]) if texts else None


def critic_of_any_labels(shop: Workshop, name: str, actor: Decoder, rows: Items[Row]) -> Critic:
    """A critic on the actor's trunk from rewards of any source: their order within a state, and their height."""
    start = dataclasses.replace(init(critic_specs(shop.config, likelihood=True), shop.key("critic")), trunk=actor)
    objective = steps.critic(
        steps.Network(shop.config), pairwise=0.0, listwise=1.0, pointwise=shop.settings.pointwise, soft=True, centre=0.0
    )
    return shop.fit(name, start, Run(objective, shop.settings.critic, shuffled(shop, rows)))
