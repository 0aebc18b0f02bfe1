"""One evaluation: an agent, a chat model, perhaps a critic that picks, and a benchmark, from questions to results."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from jraggym.agent_episodes import AgentRules, Scorer, run_agent
from jraggym.agents import AGENTS
from jraggym.agents.digests import Summariser
from jraggym.chat_model import ChatModel
from jraggym.chats.local import Local
from jraggym.chats.opening import ChatSpec, open_chat, open_scorer, settings_of
from jraggym.data.benchmarks import BENCHMARKS, load_benchmark
from jraggym.data.questions import QuestionSet
from jraggym.data.synthhop import make_world
from jraggym.episode_log import EpisodeLog
from jraggym.errors import InputError
from jraggym.evaluation import answer_scores
from jraggym.labelling import RewardSource
from jraggym.models.bert_encoder import BertEncoder, minilm_path
from jraggym.retrieval.base import QueryRetriever
from jraggym.retrieval.corpus import Corpus
from jraggym.retrieval.hybrid import HybridRetriever
from jraggym.retrieval.milvus_collection import PACE, Milvus
from jraggym.retrieval.presets import fused, preset_of, preset_retriever
from jraggym.scripted import Lookup

_PATHS = ("data_dir", "corpus", "encoder", "encoder_documents")  # that `deciding` tells of


@dataclass(frozen=True)
class Qa:
    """An evaluation. Every agent has the same budget: `rules.max_turns` turns, the last of them without a search."""

    chat: ChatSpec
    """The actor: a server, or a model on this machine."""
    out: Path = Path("runs/qa")
    """Folder of episodes.jsonl and results.json; an unfinished evaluation is continued."""
    agent: str = "re2search"
    """direct, cot, rag, react, search_o1, re2search, ircot or iter_retgen."""
    method: str = "ZSL"
    """The row's name in tables: ZSL, SFT, DPO, PRM ..."""
    rules: AgentRules = field(default_factory=lambda: AgentRules(slots=64))
    critic: str | None = None
    """Model of a critic, trained on this agent's prompts, that picks among the candidates."""
    critic_prompt: int = 16_384
    """The longest prompt of the critic, in tokens."""
    summariser: str | None = None
    """Another model, beside the actor's, that makes the digests."""
    benchmark: str = "synthhop"
    """hotpotqa, twowiki, musique, bamboogle, medqa, pubmedqa, or the embedded world synthhop."""
    split: str = "test"
    data_dir: Path | None = None
    """Folder of the benchmark's official files."""
    corpus: Path | None = None
    """jsonl of what is searched; without it, the paragraphs that the questions bring."""
    limit: int | None = None
    """Only the first so many questions."""
    retriever: Literal["bm25", "minilm", "preset", "milvus"] = "bm25"
    """BM25 alone; fused with MiniLM; the paper's retriever of this benchmark, whose weights are --encoder; or one of
    these two on a Milvus server."""
    milvus: Milvus = field(default_factory=Milvus)
    """The collection that milvus searches; without a corpus it is taken as it is."""
    encoder: Path | None = None
    """Folder of the preset's encoder."""
    encoder_documents: Path | None = None
    """Folder of the documents' encoder, where it is another one."""
    vectors: Path | None = None
    """Folder where the corpus's vectors are kept, for all evaluations that name it; without one, in `out`. The first
    evaluation makes them: begin no second one before they are there."""
    documents: int = 32
    """A search brings so many."""


def deciding(qa: Qa) -> dict[str, Any]:
    """The settings that decide what an evaluation finds, as JSON values."""
    found = {**dataclasses.asdict(qa), "chat": settings_of(qa.chat)}
    found["rules"] = {name: value for name, value in found["rules"].items() if name not in ("timeout", "slots")}
    milvus = {name: value for name, value in found.pop("milvus").items() if name not in PACE}
    found |= {"milvus": milvus} if qa.retriever == "milvus" else {}
    return {name: value for name, value in found.items() if name not in ("out", "vectors")}


def evaluated(out: Path) -> Qa:
    """The evaluation that a folder holds, by what `deciding` told of it; raises InputError where there is none."""
    try:
        found = json.loads((out / "job.json").read_text())
        if found.pop("experiment") != "qa":
            raise ValueError("another job")
        chat, rules = Local(found.pop("chat")["model"]), AgentRules(**found.pop("rules"))
        paths = {name: found[name] and Path(found[name]) for name in _PATHS}
        milvus = Milvus(**found.pop("milvus", {}))
        return Qa(chat, out, rules=rules, milvus=milvus, **{**found, **paths})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{out} holds no evaluation", got=error, remedy="Name a folder of eval.qa.") from error


def check(qa: Qa, rewarded: bool = False) -> None:
    """Raises InputError for an unknown agent, and for a critic that picks nothing or is asked for and not named.

    Rewards may pick where candidates are `rewarded`, which in an evaluation they are not.
    """
    if qa.agent not in AGENTS:
        raise InputError("unknown agent", got=repr(qa.agent), remedy=f"Use one of {', '.join(AGENTS)}.")
    if (qa.critic is not None) != (qa.rules.select == "score"):
        got = f"critic {qa.critic} and rules.select {qa.rules.select!r}"
        raise InputError("a critic picks by score, and only a critic", got=got, remedy="Give both, or neither.")
    if qa.rules.select == "reward" and not rewarded:
        raise InputError("an evaluation sees no reward", got="rules.select 'reward'", remedy="Use score or first.")


def open_questions(qa: Qa) -> QuestionSet:
    """The questions and what is searched; raises InputError for what is missing."""
    if qa.benchmark == "synthhop":
        world = make_world(qa.split, qa.rules.seed, questions=max(400, qa.limit or 0))
        found = QuestionSet(world.examples, Corpus.from_documents(world.documents))
    elif qa.benchmark not in BENCHMARKS:
        known = ", ".join(("synthhop", *BENCHMARKS))
        raise InputError("unknown benchmark", got=repr(qa.benchmark), remedy=f"Use one of {known}.")
    elif qa.data_dir is None:
        raise InputError(f"{qa.benchmark} needs its files", got="no --data-dir", remedy="Add --data-dir FOLDER.")
    else:
        found = load_benchmark(qa.benchmark, qa.data_dir, qa.split)
    if qa.corpus is not None:
        found = found.over(Corpus.from_jsonl(qa.corpus))
    if qa.limit is not None:
        found = found._replace(examples=found.examples[: qa.limit])
    if not found.examples:
        raise InputError("no question to ask", got=f"{qa.benchmark} {qa.split}", remedy="Name another split.")
    if not len(found.corpus) and qa.agent not in ("direct", "cot") and qa.retriever != "milvus":
        raise InputError(f"{qa.benchmark} brings no paragraphs", got="no --corpus", remedy="Add --corpus FILE.")
    return found


def open_retriever(qa: Qa, corpus: Corpus, out: Path) -> Lookup:
    """From queries to `qa.documents` documents each; vectors are kept in `qa.vectors`, or in `out`.

    Raises InputError as its parts do.
    """
    vectors = qa.vectors or out / "vectors"
    milvus = qa.milvus if qa.retriever == "milvus" else None
    found: QueryRetriever
    if not len(corpus) and (milvus is None or qa.agent in ("direct", "cot")):
        return lambda queries: [()] * len(queries)
    if qa.retriever == "bm25":
        found = HybridRetriever(corpus)
    elif qa.retriever == "preset" or (milvus and qa.encoder):
        if qa.encoder is None:
            raise InputError("the preset's encoder is missing", got="no --encoder", remedy="Add --encoder FOLDER.")
        folders = (qa.encoder, qa.encoder_documents)
        found = preset_retriever(preset_of(qa.benchmark), corpus, *folders, vectors=vectors, milvus=milvus)
    else:
        found = fused(BertEncoder.load(minilm_path()), corpus, vectors=vectors, milvus=milvus)
    return even_batches(lambda queries: found(queries, qa.documents))


def even_batches(retriever: Lookup) -> Lookup:
    """The same, asked with blank queries up to a power of two: an encoder compiles for each number of queries."""

    def look_up(queries: Sequence[str]) -> Sequence[Any]:
        blank = (1 << max(0, len(queries) - 1).bit_length()) - len(queries)
        return retriever([*queries, *[""] * blank])[: len(queries)]

    return look_up


def run(
    qa: Qa,
    questions: QuestionSet,
    chat: ChatModel,
    retriever: Lookup,
    *,
    scorer: Scorer | None = None,
    summariser: ChatModel | None = None,
    source: RewardSource | None = None,
    report: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Asks what `qa.out` does not answer yet, and gives the results over all questions.

    An evaluation that was killed and is called again ends with the same results, and asks for no finished episode. Of
    the digests the same holds. With a `source` all candidates are rewarded. `report` gets the number of finished
    episodes and of all.
    """
    check(qa, source is not None)
    log, examples = EpisodeLog(qa.out / "episodes.jsonl"), questions.examples
    found = log.resume(examples)
    left = [example for example in examples if example.id not in found]
    before = len(found)
    episodes = run_agent(
        AGENTS[qa.agent],
        chat,
        left,
        retriever,
        qa.rules,
        summariser=Summariser(summariser or chat, qa.summariser or qa.chat.model, path=qa.out / "digests.jsonl"),
        scorer=scorer,
        source=source,
        report=None if report is None else lambda done: report(before + done, len(examples)),
        done=lambda number, episode: log.add(left[number], episode),
    )
    found |= {example.id: episode for example, episode in zip(left, episodes, strict=True)}
    scores = answer_scores(examples, [found[example.id] for example in examples], qa.rules.seed)
    about = ("method", "agent", "benchmark", "split", "critic", "retriever", "documents")
    named = {"model": qa.chat.model, **{name: getattr(qa, name) for name in about}}
    return {**named, "rules": deciding(qa)["rules"], "notes": list(questions.notes), **scores}


def open_models(qa: Qa) -> tuple[ChatModel, Scorer | None, ChatModel | None]:
    """The actor, the critic's scorer and the summariser's model, where they are named; InputError where one is not."""
    cache = qa.out / "answers.sqlite"
    scorer = None if qa.critic is None else open_scorer(Local(qa.critic, max_prompt=qa.critic_prompt))
    other = None if qa.summariser is None else open_chat(dataclasses.replace(qa.chat, model=qa.summariser), cache)
    return open_chat(qa.chat, cache), scorer, other
