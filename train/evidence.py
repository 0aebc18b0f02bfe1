"""Evidence search on real questions: a critic chooses every search, step by step.

    python -m train.evidence --twowiki data/2wikimultihopqa --hotpotqa data/hotpotqa --musique data/musique

A critic (MiniLM's trunk with a scalar head) learns from process labels of supporting facts, which candidate search
brings new gold evidence, on the training files of all folders named. It then chooses the searches of their development
files: of each over its own pooled paragraphs, or over pooled_questions.jsonl and pooled_corpus.jsonl where a folder has
them. A search carries out the best few proposals together and reads their documents in turn; all rows read the same
number of documents. The score is all-gold recall: the share of questions whose supporting documents were all read.
`python -m eval.pooled --runs ...` lays runs of several seeds together.

It can be killed at any moment and called again.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import tyro

from jraggym.checkpoint import Checkpointer
from jraggym.data.benchmarks import load_benchmark
from jraggym.data.hotpotqa import read_pooled
from jraggym.data.questions import QuestionSet
from jraggym.errors import InputError, exit_on_input_error
from jraggym.evidence.episodes import Lookup
from jraggym.evidence.limits import limits
from jraggym.evidence.training import Choice, choices_from_json, shuffled
from jraggym.metrics import bootstrap_interval
from jraggym.models.bert_critic import PairScorer, save_bert_critic
from jraggym.models.bert_encoder import BertEncoder, minilm_path
from jraggym.preemption import preemptible
from jraggym.recipes.evidence import (
    EvidenceSettings,
    Searcher,
    at_random,
    by_critic,
    by_oracle,
    choices_of,
    in_two_ways,
    recall,
    single_shot,
    the_first,
    train_critic,
)
from jraggym.retrieval.hybrid import HybridRetriever
from jraggym.retrieval.vectors import stored_vectors
from train.job import claim, write
from train.results import Console

CRITIC, SHUFFLED, RANDOM, FIRST, ORACLE = (
    "critic",
    "shuffled rewards",
    "random critic",
    "first proposals",
    "oracle",
)
SINGLE = ("bm25", "dense", "fused")
BENCHMARKS = ("hotpotqa", "twowiki", "musique")

Splits = dict[str, tuple[QuestionSet, QuestionSet]]  # to learn from and to be scored on, by benchmark
Scores = dict[str, np.ndarray]  # [questions] of each row


@dataclass(frozen=True)
class Arguments:
    """Trains and tests a critic that chooses searches, on multi-hop questions with supporting facts."""

    hotpotqa: Path | None = None
    """Folder of HotpotQA's official files."""
    twowiki: Path | None = None
    """Folder of 2WikiMultihopQA's official files."""
    musique: Path | None = None
    """Folder of MuSiQue's official files."""
    out: Path = Path("runs/evidence")
    """Folder of everything that is made; an unfinished job is continued."""
    seed: int = 0
    """Decides the critic's head, the simulated episodes and the order of batches."""
    evaluate: Literal["test", "development"] = "test"
    """development: learn from four fifths of the training questions and score the others."""
    control: bool = True
    """Also train a critic on rewards that are shuffled within each state."""
    encoder: str = "minilm"
    """minilm, or the folder of a BERT encoder: the retriever's, and the trunk of the critic."""
    settings: EvidenceSettings = field(default_factory=EvidenceSettings)


def main(arguments: Arguments) -> None:
    """Runs the job and prints the tables."""
    out, settings, seed, console = arguments.out, arguments.settings, arguments.seed, Console()
    splits = read_splits(arguments)
    claim(out, {"job": "evidence", **dataclasses.asdict(arguments) | {"out": None}})
    encoder = BertEncoder.load(minilm_path() if arguments.encoder == "minilm" else arguments.encoder)
    choices: list[Choice] = []
    for name, (learn, _) in splits.items():
        with console.stage(f"label {name}"):
            make = partial(label, learn, encoder, arguments, console)
            choices += _kept(out / f"choices-{name}.json", make)
    scorers = {}
    for kind in (CRITIC, SHUFFLED) if arguments.control else (CRITIC,):
        with console.stage(kind):
            data = choices if kind == CRITIC else shuffled(choices, seed)
            saved = Checkpointer(out / "checkpoints" / kind.replace(" ", "-"), keep=1)
            weights, tokenize = train_critic(data, encoder, settings, seed, saved, console.progress)
            scorers[kind] = PairScorer(weights, encoder.query.config, tokenize)
            if kind == CRITIC:
                save_bert_critic(out / "critic", weights, encoder.query.config, tokenize)
    scored, missed = {}, {}
    for name, (_, exam) in splits.items():
        with console.stage(f"score {name}"):
            lookup = lookup_of(exam, encoder, arguments)
            scored[name] = score(exam, encoder, lookup, scorers, arguments)
            missed[name] = limits(exam.examples, lookup, by_critic(scorers[CRITIC]), settings.budget)
        print(table(name, exam, scored[name], settings))
        reasons = "; ".join(f"{reason} {count}" for reason, count in missed[name].items())
        print(f"\nDocuments that the critic missed: {reasons}")
    _save(arguments, splits, scored, missed, len(choices), console)


def read_splits(arguments: Arguments) -> Splits:
    """The question sets of each benchmark named.

    Raises InputError for none, files that are missing or overlap, or questions without evidence, which would count as
    found.
    """
    named = [(name, folder) for name in BENCHMARKS if (folder := getattr(arguments, name)) is not None]
    if not named:
        flags = ", ".join(f"--{name}" for name in BENCHMARKS)
        raise InputError("there are no questions", got="no folder", remedy=f"Name one or more of {flags}.")
    splits: Splits = {}
    for name, folder in named:
        learn = load_benchmark(name, folder, "train")
        if arguments.evaluate == "development":
            held, rest = (
                tuple(e for i, e in enumerate(learn.examples) if (i % 5 == 0) == out) for out in (True, False)
            )
            splits[name] = learn._replace(examples=rest), learn._replace(examples=held)
            continue
        pooled = (folder / "pooled_questions.jsonl").exists()
        exam = read_pooled(folder) if pooled else load_benchmark(name, folder, "dev")
        if shared := {e.question for e in learn.examples} & {e.question for e in exam.examples}:
            got = f"{len(shared)} questions in both"
            raise InputError(f"training and test questions of {name} overlap", got=got, remedy="Use other files.")
        splits[name] = learn, exam
    for name, both in splits.items():
        if bare := [example.id for questions in both for example in questions.examples if not example.support]:
            remedy = "Leave them out, or use files with supporting facts."
            raise InputError(f"questions of {name} without evidence", got=bare[:3], remedy=remedy)
    return splits


def searcher(questions: QuestionSet, encoder: BertEncoder, arguments: Arguments, kind: str) -> Searcher:
    """A retriever over the corpus of the questions: bm25, dense, or both fused."""
    settings, used, vectors = arguments.settings, None, None
    if kind != "bm25":
        used, vectors = encoder, stored_vectors(arguments.out, encoder.document, questions.corpus.documents)
    lexical, read = kind != "dense", settings.budget.read
    return Searcher(HybridRetriever(questions.corpus, used, read, settings.depth, lexical=lexical, vectors=vectors))


def lookup_of(questions: QuestionSet, encoder: BertEncoder, arguments: Arguments) -> Lookup:
    """What carries out the proposals, in labelling and in scoring alike."""
    fused, names = (searcher(questions, encoder, arguments, kind) for kind in ("fused", "bm25"))
    return in_two_ways({example.question for example in questions.examples}, fused, names)


def label(learn: QuestionSet, encoder: BertEncoder, arguments: Arguments, console: Console) -> list[Choice]:
    """The labelled choices of one benchmark's training questions."""
    lookup = lookup_of(learn, encoder, arguments)
    return choices_of(learn, lookup, arguments.settings, arguments.seed, console.progress)


def score(
    exam: QuestionSet, encoder: BertEncoder, lookup: Lookup, scorers: Mapping[str, PairScorer], arguments: Arguments
) -> Scores:
    """All rows of one benchmark."""
    settings = arguments.settings
    found = {name: recall(exam, lookup, by_critic(scorer), settings) for name, scorer in scorers.items()}
    found[RANDOM] = recall(exam, lookup, at_random(arguments.seed), settings)
    found[FIRST] = recall(exam, lookup, the_first, settings)
    for kind in SINGLE:
        found[kind] = single_shot(exam, searcher(exam, encoder, arguments, kind), settings)
    return found | {ORACLE: recall(exam, lookup, by_oracle(exam.examples, lookup, settings), settings)}


def table(name: str, exam: QuestionSet, scored: Scores, settings: EvidenceSettings) -> str:
    """One benchmark's rows as a table."""
    kinds = sorted({example.kind for example in exam.examples})
    lines = [
        f"\n**{name}**: {len(exam.examples)} questions, {len(exam.corpus)} documents, {settings.budget.read} read\n",
        f"| all-gold recall | all | 95 % interval | {' | '.join(kinds)} |",
        "|---" * (3 + len(kinds)) + "|",
    ]
    for row, values in scored.items():
        low, high = bootstrap_interval(values, seed=0)
        each = [f"{values[[e.kind == kind for e in exam.examples]].mean():.2f}" for kind in kinds]
        lines.append(f"| {row} | {values.mean():.3f} | {low:.3f} to {high:.3f} | {' | '.join(each)} |")
    return "\n".join(lines)


def _kept(path: Path, make: Callable[[], list[Choice]]) -> list[Choice]:
    """The choices of an earlier call, or new ones."""
    if path.exists():
        return choices_from_json(json.loads(path.read_text()))
    choices = make()
    write(path, json.dumps([dataclasses.asdict(choice) for choice in choices]))
    return choices


def _save(
    arguments: Arguments,
    splits: Splits,
    scored: dict[str, Scores],
    missed: dict[str, dict[str, int]],
    choices: int,
    console: Console,
) -> None:
    """results.json, and scores.json for eval.pooled."""
    em = {f"{name}: {row}": values.tolist() for name, rows in scored.items() for row, values in rows.items()}
    claims = [
        (f"{name}: {CRITIC}", f"{name}: {row}", 0.0)
        for name, rows in scored.items()
        for row in rows
        if row not in (CRITIC, ORACLE)
    ]
    write(arguments.out / "scores.json", json.dumps({"seed": arguments.seed, "em": em, "claims": claims}))
    summary: dict[str, Any] = {
        "recall": {row: float(np.mean(values)) for row, values in em.items()},
        "missed": missed,
        "choices": choices,
        "stages": console.stages,
        "device": jax.devices()[0].device_kind,
        "notes": {name: [*learn.notes, *exam.notes] for name, (learn, exam) in splits.items()},
    }
    write(arguments.out / "results.json", json.dumps(summary, indent=1))
    print(f"\n{arguments.out}/results.json, and the critic in {arguments.out}/critic")


if __name__ == "__main__":
    with exit_on_input_error(), preemptible():
        main(tyro.cli(Arguments, description=__doc__))
