"""Collecting with an agent's full prompts: a judge ranks the candidates of every turn, and its best is executed.

This is how RAG-Gym collects (arXiv 2502.13957, appendix E.1): the states behind a good action are what is asked next.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jraggym.agent_episodes import AgentRules
from jraggym.agent_records import agent_records
from jraggym.agents import AGENTS
from jraggym.chats.opening import settings_of
from jraggym.data.process import ProcessRecord, Provenance, build_dataset
from jraggym.data.questions import QuestionSet
from jraggym.episode_log import EpisodeLog
from jraggym.errors import InputError
from jraggym.labelling import RewardSource
from jraggym.recipes.agent_labels import support_of
from jraggym.recipes.labelling import How, found_labels, open_judge
from jraggym.recipes.qa import Qa, check, deciding, open_models, open_retriever, run
from jraggym.sources.control import random_source

REWARDS = ("llm", "support", "random")


@dataclass(frozen=True)
class AgentCollect(Qa):
    """Runs an agent on training questions; every candidate is rewarded, and `rules.select` says which is executed."""

    out: Path = Path("runs/agent-data")
    """Folder of episodes.jsonl, dataset and results.json; an unfinished collection is continued."""
    rules: AgentRules = field(
        default_factory=lambda: AgentRules(candidates=10, temperature=1.0, select="reward", slots=64)
    )
    split: str = "train"
    rewards: str = "llm"
    """llm (a chat model that ranks), support (rules over supporting documents) or random; see jraggym/sources."""
    how: How = field(default_factory=How)
    """Of llm: the judge."""


def deciding_collection(collect: AgentCollect) -> dict[str, Any]:
    """The settings that decide what a collection finds, as JSON values."""
    how = {**dataclasses.asdict(collect.how), "judge": settings_of(collect.how.judge)}
    del how["actor"]  # of roll-outs, which there are none of
    return {**deciding(collect), "how": how if collect.rewards == "llm" else None}


def check_collection(collect: AgentCollect) -> None:
    """Raises InputError as `check` does, and for rewards that are not known while an episode runs."""
    check(collect, rewarded=True)
    if collect.rewards not in REWARDS:
        known = ", ".join(REWARDS)
        raise InputError("no such rewards while an episode runs", got=repr(collect.rewards), remedy=f"Use {known}.")


def collect_episodes(
    collect: AgentCollect, questions: QuestionSet, report: Callable[[str, int, int, Any], None]
) -> dict[str, Any]:
    """Writes `out`/episodes.jsonl, a line when an episode ends, and `out`/dataset; gives the scores and what is in it.

    Called again after a kill it asks for no finished episode. `report` gets (stage, done, of how many, None). Raises
    InputError as `check_collection` and the parts do.
    """
    check_collection(collect)
    chat, scorer, summariser = open_models(collect)
    found = run(
        collect,
        questions,
        chat,
        open_retriever(collect, questions.corpus, collect.out),
        scorer=scorer,
        summariser=summariser,
        source=_source(collect, questions),
        report=lambda done, total: report("episodes", done, total, None),
    )
    records = build_dataset(collect.out / "dataset", _records(collect))
    labels = found_labels(records, collect.out / "judge", collect.rewards)
    return {**found, "rewards": collect.rewards, "labels": {**labels, "data": str(collect.out / "dataset")}}


def _source(collect: AgentCollect, questions: QuestionSet) -> RewardSource:
    if collect.rewards == "support":
        return support_of(questions.examples)
    seed = collect.rules.seed
    return random_source(seed) if collect.rewards == "random" else open_judge(collect.how, collect.out / "judge", seed)


def _records(collect: AgentCollect) -> Iterable[ProcessRecord]:
    agent = AGENTS[collect.agent]
    about = Provenance(f"{collect.agent}, {collect.chat.model}", collect.rewards, collect.retriever, collect.rules.seed)
    for example, episode in EpisodeLog(collect.out / "episodes.jsonl").read():
        yield from agent_records(agent, example, episode, collect.rules.max_turns, about)
