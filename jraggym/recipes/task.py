"""What a recipe is run on: questions, corpora and plans of training, development and test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jraggym.data.benchmarks import load_benchmark
from jraggym.data.plan import Plan, plan_by_titles
from jraggym.data.questions import QuestionSet
from jraggym.data.synthhop import HOPS, make_world
from jraggym.errors import InputError
from jraggym.labelling import Found, Judge, support_judge
from jraggym.retrieval.corpus import Corpus
from jraggym.types import Action, Example, State


@dataclass(frozen=True)
class Split:
    """Questions over one corpus, with a plan for each question that can be demonstrated."""

    examples: tuple[Example, ...]
    corpus: Corpus
    plans: Mapping[str, Plan]


@dataclass(frozen=True)
class Task:
    """Three splits, of which tuning never sees the test one, and the judge of the training one.

    `permuted` is a control with values dealt anew.
    """

    name: str
    train: Split
    development: Split
    test: Split
    permuted: Split | None = None
    judge: Judge = support_judge


def synthhop_task(seed: int, *, train: int, development: int, test: int, hops: int = HOPS) -> Task:
    """The embedded world with chains of up to `hops` relations; the other numbers are questions."""
    worlds = {
        split: make_world(split, seed, questions=number, hops=hops)
        for split, number in (("train", train), ("development", development), ("test", test))
    }
    splits = {name: _world_split(world) for name, world in worlds.items()}
    permuted = _world_split(worlds["test"].permuted(seed))
    return Task("synthhop", **splits, permuted=permuted, judge=informed_judge(splits["train"].plans))


def informed_judge(plans: Mapping[str, Plan]) -> Judge:
    """The judge that knows from the plans what a precise query is."""

    def judge(example: Example, state: State, actions: Sequence[Action], found: Sequence[Found]) -> list[float]:
        return support_judge(example, state, actions, found, plans[example.id].queries)

    return judge


def _world_split(world) -> Split:
    return Split(world.examples, Corpus.from_documents(world.documents), world.plans)


def hotpotqa_task(folder: Path, *, train: int, development: int, test: int) -> Task:
    """HotpotQA from the official files in `folder`; development questions are the last ones of the training file.

    Each split's corpus is the union of its questions' paragraphs. Raises InputError for a missing folder or file.
    """
    if not folder.is_dir():
        raise InputError("no HotpotQA folder", got=folder, remedy="Name the folder that holds the official json files.")
    learn, exam = (load_benchmark("hotpotqa", folder, split) for split in ("train", "dev"))
    held = max(1, min(development, len(learn.examples) // 10))
    return Task(
        "hotpotqa",
        _titled(learn, learn.examples[:-held][:train]),
        _titled(learn, learn.examples[-held:]),
        _titled(exam, exam.examples[:test]),
    )


def _titled(questions: QuestionSet, examples: Sequence[Example]) -> Split:
    plans = {example.id: plan_by_titles(example, questions.brought[example.id]) for example in examples}
    return Split(tuple(examples), questions.corpus, plans)
