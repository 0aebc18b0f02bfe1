"""The benchmarks of RAG-Gym by name: their files, the paper's splits, and a built form in ArrayRecord.

    test = load_benchmark("hotpotqa", "data/hotpotqa", "test1000")            # reads hotpot_dev_distractor_v1.json
    test = load_benchmark("hotpotqa", "data/hotpotqa", "test1000", "built")   # builds once, and reads that afterwards

    built/hotpotqa-dev/hotpotqa/1.0.0/    for anyone: tfds.data_source("hotpotqa", split="dev", data_dir=...)

RAG-Gym (appendix C) trains on the first 1,000 questions of HotpotQA's development file and tests on its last 1,000, on
the last 1,000 of 2WikiMultihopQA's, on all of Bamboogle, and on MedQA's test file; which 1,000 questions of MedQA's
training file it learns from is not said, and here they are the first ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from jraggym.data import bamboogle, hotpotqa, medqa, musique, pubmedqa, twowiki
from jraggym.data.array_record import Builder, write_dataset
from jraggym.data.questions import Item, QuestionSet, gathered
from jraggym.errors import InputError
from jraggym.types import Document, Example
from jraggym.whole import whole_folder

VERSION = "1.1.0"
FIRST, LAST = slice(None, 1000), slice(-1000, None)


@dataclass(frozen=True)
class Benchmark:
    """How a benchmark is read: its reader, the file of each plain split, and splits that are parts of these."""

    read: Callable[[str | Path], QuestionSet]
    files: Mapping[str, tuple[str, ...]]  # patterns of the file's name, the first that matches counts
    parts: Mapping[str, tuple[str, slice]] = field(default_factory=dict)  # name -> plain split and which of it


BENCHMARKS = {
    "hotpotqa": Benchmark(
        hotpotqa.read_official,
        {"train": ("hotpot_train*.json",), "dev": ("hotpot_dev_distractor*.json", "hotpot_dev*.json")},
        {"train1000": ("dev", FIRST), "test1000": ("dev", LAST)},
    ),
    "twowiki": Benchmark(
        twowiki.read_official, {"train": ("train*.json",), "dev": ("dev*.json",)}, {"test1000": ("dev", LAST)}
    ),
    "musique": Benchmark(
        musique.read_official,
        {split: (f"musique_ans*_{split}*.jsonl", f"musique*_{split}*.jsonl") for split in ("train", "dev")},
    ),
    "bamboogle": Benchmark(bamboogle.read_official, {"test": ("[Bb]amboogle*.csv", "[Bb]amboogle*.json")}),
    "medqa": Benchmark(
        medqa.read_official,
        {split: (f"phrases_no_exclude_{split}*.jsonl", f"{split}*.jsonl") for split in ("train", "dev", "test")},
        {"train1000": ("train", FIRST)},
    ),
    "pubmedqa": Benchmark(pubmedqa.read_official, {"labelled": ("ori_pqal*.json",)}),
}


def load_benchmark(name: str, folder: str | Path, split: str, built: str | Path | None = None) -> QuestionSet:
    """The questions of a split with the paragraphs that they bring, the same from the official file and from `built`.

    Where the file holds fewer questions than the split asks for, a note of the result says so.

    Args:
      folder: holds the official files, under their published names.
      built: a folder for the built form, whose second reading parses no json; it is read even when the official file
        is gone. None: read the official file.

    Raises:
      InputError: for an unknown name or split, a missing, ambiguous or broken file, a `built` that is damaged or comes
        from another file, or a split that would share questions with another one of the same file.
    """
    if name not in BENCHMARKS:
        raise InputError("unknown benchmark", got=repr(name), remedy=f"Use one of {', '.join(BENCHMARKS)}.")
    benchmark = BENCHMARKS[name]
    if split not in (names := [*benchmark.files, *benchmark.parts]):
        raise InputError(f"unknown split of {name}", got=repr(split), remedy=f"Use one of {', '.join(names)}.")
    plain, part = benchmark.parts.get(split, (split, slice(None)))
    if built is None:
        questions = benchmark.read(find_file(name, folder, plain))
        notes = (*questions.notes, *_short(name, split, len(questions.examples)))
        return gathered(list(questions.items())[part], folder, notes)
    place = Path(built) / f"{name}-{plain}"
    source, notes = _open_or_build(name, Path(folder), plain, place)
    notes = (*notes, *_short(name, split, len(source)))
    with _damage_named(place):
        return gathered([from_record(source[i]) for i in range(len(source))[part]], place, notes)


def find_file(name: str, folder: str | Path, split: str) -> Path:
    """The official file of a plain split; raises InputError when there is none or more than one."""
    patterns = BENCHMARKS[name].files[split]
    for pattern in patterns:
        if len(found := sorted(Path(folder).glob(pattern))) > 1:
            got = ", ".join(path.name for path in found)
            raise InputError(f"several {name} {split} files in {folder}", got=got, remedy="Leave one of them there.")
        if found:
            return found[0]
    remedy = f"Put the official {patterns[0]} there."
    raise InputError(f"no {name} {split} file in {folder}", got="nothing", remedy=remedy)


def _short(name: str, split: str, count: int) -> tuple[str, ...]:
    """A note when a file of `count` questions is too small for the split; refuses splits that would overlap."""
    parts = BENCHMARKS[name].parts
    if split not in parts:
        return ()
    plain, part = parts[split]
    ours = set(range(count)[part])
    for other, (theirs, cut) in parts.items():
        if other != split and theirs == plain and (shared := ours & set(range(count)[cut])):
            got = f"{len(shared)} of {count} questions in both"
            remedy = f"Use the {plain} split, or the whole file."
            raise InputError(f"the splits {split} and {other} of {name} would overlap", got=got, remedy=remedy)
    wanted = len(range(10**9)[part])
    return (f"{split} has {len(ours)} questions instead of {wanted}",) if len(ours) < wanted else ()


class BenchmarkBuilder(Builder):
    """Writes the questions of one official file in their order, each with its paragraphs."""

    VERSION = tfds.core.Version(VERSION)

    def __init__(self, *, name: str, split: str, questions: QuestionSet, sha256: str, **kwargs: Any):
        self.name, self._split, self._questions, self._sha256 = name, split, questions, sha256
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"{self.name} {self._split}: one record is one question with the paragraphs that it brings.",
            features=_features(),
            metadata=tfds.core.MetadataDict({"sha256": self._sha256, "notes": list(self._questions.notes)}),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {self._split: self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for example, documents in self._questions.items():
            yield example.id, to_record(example, documents)


def _features() -> tfds.features.FeaturesDict:
    text = tfds.features.Text()
    return tfds.features.FeaturesDict(
        {
            **dict.fromkeys(("id", "question", "kind"), text),
            **dict.fromkeys(("answers", "support"), tfds.features.Sequence(text)),
            "options": tfds.features.Sequence({"letter": text, "text": text}),
            "paragraphs": tfds.features.Sequence({"id": text, "title": text, "text": text}),
        }
    )


def to_record(example: Example, documents: tuple[Document, ...]) -> dict[str, Any]:
    """A question and its paragraphs as the dataset's fields."""
    return {
        **{name: getattr(example, name) for name in ("id", "question", "kind")},
        **{name: list(getattr(example, name)) for name in ("answers", "support")},
        "options": [{"letter": letter, "text": text} for letter, text in example.options],
        "paragraphs": [{"id": d.id, "title": d.title, "text": d.text} for d in documents],
    }


def from_record(record: Mapping[str, Any]) -> Item:
    """The question and paragraphs that `to_record` wrote, as read back by tensorflow-datasets."""
    options, paragraphs = (
        tuple(zip(*([text.decode() for text in record[name][column]] for column in columns), strict=True))
        for name, columns in (("options", ("letter", "text")), ("paragraphs", ("id", "title", "text")))
    )
    id, question, kind = (record[name].decode() for name in ("id", "question", "kind"))
    answers, support = (tuple(text.decode() for text in record[name]) for name in ("answers", "support"))
    return Example(id, question, answers, kind, support, options), tuple(Document(*fields) for fields in paragraphs)


def _open_or_build(name: str, folder: Path, split: str, built: Path) -> tuple[Any, tuple[str, ...]]:
    """Random access to the built records, and the notes of their reader."""
    if not built.exists():
        file = find_file(name, folder, split)
        questions, sha256 = BENCHMARKS[name].read(file), _sha256(file)
        with whole_folder(built) as building:
            write_dataset(BenchmarkBuilder, building, name=name, split=split, questions=questions, sha256=sha256)
    with _damage_named(built):
        builder = tfds.builder_from_directory(built / name / VERSION)
        metadata, source = builder.info.metadata, builder.as_data_source(split=split)
        sha256, notes = metadata["sha256"], tuple(metadata["notes"])
        if len(source) != builder.info.splits[split].num_examples:
            raise ValueError(f"{len(source)} questions")
    try:
        file = find_file(name, folder, split)
    except InputError:
        return source, notes  # the built form stands for itself
    if _sha256(file) != sha256:
        raise InputError(f"{built} was built from another file than {file}", got=sha256[:12], remedy="Remove it.")
    return source, notes


@contextmanager
def _damage_named(built: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # it depends on which byte is damaged
        remedy = "Remove that folder and load again."
        raise InputError(f"the dataset in {built} is damaged", got=error, remedy=remedy) from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
