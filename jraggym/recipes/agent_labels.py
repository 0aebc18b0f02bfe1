"""Process rewards for the candidates that an evaluation's agent proposed: from episodes to a critic's training data."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jraggym.agent_episodes import run_agent
from jraggym.agent_records import agent_decisions, agent_records
from jraggym.agents import AGENTS
from jraggym.agents.digests import Summariser
from jraggym.chats.opening import open_chat
from jraggym.data.process import ChunkStore, ProcessRecord, Provenance, build_dataset
from jraggym.data.process.record import encode
from jraggym.episode_log import EpisodeLog
from jraggym.errors import InputError
from jraggym.labelling import RewardSource
from jraggym.recipes.labelling import How, found_labels, labels_basis, worldless_source
from jraggym.recipes.qa import Qa, evaluated, open_questions, open_retriever
from jraggym.scripted import Lookup
from jraggym.sources.relabel import Decide, relabel
from jraggym.sources.rollouts import RolloutSource
from jraggym.sources.support import support_source
from jraggym.types import Example, State


@dataclass(frozen=True)
class AgentLabel:
    """Puts process rewards on the episodes of an evaluation, which had several candidates a turn."""

    out: Path
    """Folder of the labelled dataset; an unfinished job is continued."""
    data: Path = Path("runs/qa")
    """Folder of the evaluation (eval.qa), with --rules.candidates above 1."""
    rewards: str = "llm"
    """llm, support, rollouts, outcome, random or human; see jraggym/sources."""
    how: How = field(default_factory=How)
    seed: int = 0
    """Of the judge's orders, of roll-outs, and of random."""
    vectors: Path | None = None
    """The evaluation's --vectors, where it had one (support, rollouts)."""


def label_episodes(experiment: AgentLabel, report: Callable[[str, int, int, Any], None]) -> dict[str, Any]:
    """Writes `out`/labels/REWARDS/dataset, resumably, and returns what is in it.

    `report` gets (stage, questions done, of how many, None). Raises InputError for what is no evaluation, for episodes
    without a candidate, and for a source that cannot label them.
    """
    qa, name = evaluated(experiment.data), experiment.rewards
    about = Provenance(f"{qa.agent}, {qa.chat.model}", "none", qa.retriever, qa.rules.seed)
    examples: dict[str, Example] = {}
    records: list[ProcessRecord] = []
    for example, episode in EpisodeLog(experiment.data / "episodes.jsonl").read():
        examples[example.id] = example
        records += agent_records(AGENTS[qa.agent], example, episode, qa.rules.max_turns, about)
    if not records:
        remedy = "Name the folder of an evaluation by eval.qa."
        raise InputError(f"no candidate in {experiment.data}", got=f"{len(examples)} episodes", remedy=remedy)
    folder = experiment.out / "labels" / name
    decide = functools.partial(agent_decisions, agent=AGENTS[qa.agent], examples=examples, max_turns=qa.rules.max_turns)
    notes: tuple[str, ...] = ()
    source: RewardSource
    if name == "support":
        source, (retriever, notes) = support_of(examples.values()), _searches(qa, experiment.vectors)
        decide = functools.partial(decide, retriever=retriever)
    elif name == "rollouts":
        retriever, notes = _searches(qa, experiment.vectors)
        source, decide = _rollouts(experiment, qa, retriever, folder), functools.partial(decide, retriever=retriever)
    else:
        source = worldless_source(name, records, experiment.how, experiment.seed, folder, decide)
    basis = labels_basis(name, experiment.how)
    store = ChunkStore(folder / "chunks", {"source": name, "records": _digest(records), **basis})
    done = functools.partial(_report, report, f"label, {name}", len(examples))
    labelled = relabel(records, source, store, name=name, decide=decide, report=done)
    return {**found_labels(build_dataset(folder / "dataset", labelled), folder, name), "notes": list(notes)}


def decisions_of(evaluation: Path) -> Decide:
    """What the candidates of an evaluation's episodes do, as its agent reads them; nothing of what searches brought.

    Raises InputError where there is no evaluation.
    """
    qa, log = evaluated(evaluation), EpisodeLog(evaluation / "episodes.jsonl")
    examples = {example.id: example for example, _ in log.read()}
    return functools.partial(agent_decisions, agent=AGENTS[qa.agent], examples=examples, max_turns=qa.rules.max_turns)


def support_of(examples: Collection[Example]) -> RewardSource:
    """The rule-based judge for these questions; raises InputError for one without supporting documents."""
    if bare := [example.id for example in examples if not example.support]:
        got = f"{len(bare)} of {len(examples)} questions without any, such as {bare[0]!r}"
        raise InputError("these labels need supporting documents", got=got, remedy="Use --rewards llm or outcome.")
    return support_source()


def _searches(qa: Qa, vectors: Path | None) -> tuple[Any, tuple[str, ...]]:
    """The evaluation's retriever, and the notes on its questions."""
    qa, questions = dataclasses.replace(qa, vectors=vectors), open_questions(qa)
    return open_retriever(qa, questions.corpus, qa.out), questions.notes


def _rollouts(experiment: AgentLabel, qa: Qa, retriever: Lookup, folder: Path) -> RewardSource:
    """Roll-outs of the evaluation's agent by a chat model, at the evaluation's temperature, or at 1 if that is 0.

    The same model makes the digests. A continuation in which something failed tells nothing.
    """
    how, agent = experiment.how, AGENTS[qa.agent]
    model = open_chat(how.actor, folder / "answers.sqlite")
    rules = dataclasses.replace(qa.rules, candidates=1, select="first", seed=experiment.seed)
    rules = dataclasses.replace(rules, temperature=rules.temperature or 1.0)
    reader = Summariser(model, how.actor.model, path=folder / "digests.jsonl")

    def play(examples: Sequence[Example], starts: Sequence[State]) -> list[State | None]:
        episodes = run_agent(agent, model, examples, retriever, rules, summariser=reader, starts=starts)
        finals = [episode.trajectory.final for episode in episodes]
        failed = [
            episode.costs.errors or any(turn.error for turn in final.turns[len(start.turns) :])
            for episode, final, start in zip(episodes, finals, starts, strict=True)
        ]
        return [None if fault else final for fault, final in zip(failed, finals, strict=True)]

    return RolloutSource(play, rules.max_turns, how.continuations, how.metric, reader if agent.digests else None)


def _digest(records: list[ProcessRecord]) -> str:
    digest = hashlib.sha256()
    for record in records:
        digest.update(encode(record) + b"\n")
    return digest.hexdigest()


def _report(report: Callable[[str, int, int, Any], None], stage: str, total: int, done: int) -> None:
    report(stage, min(done, total), total, None)
