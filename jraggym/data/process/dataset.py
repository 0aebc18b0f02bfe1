"""Process data as a tensorflow-datasets dataset in ArrayRecord; needs no TensorFlow.

    directory/jraggym_process/2.0.0/   readable by anyone: tfds.data_source("jraggym_process", data_dir=directory)

Two fields are JSON text: `state` (of `types.State`) and each candidate's `documents` (a list of ids),
since lists of lists need TensorFlow. An absent reward, score or log-probability is NaN.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow_datasets as tfds

from jraggym.data.array_record import Builder, write_dataset
from jraggym.data.lazy import Items
from jraggym.data.process.record import ProcessRecord, Provenance, encode
from jraggym.errors import InputError
from jraggym.types import Candidate, state_from_json, to_json

if TYPE_CHECKING:
    import grain


NAME, VERSION, SPLIT = "jraggym_process", "2.0.0", "train"
_NUMBERS, _LISTS = ("reward", "score", "logprob"), ("documents", "tokens", "logprobs")  # of a candidate, in its order
_DESCRIPTION = """One record is one state of one episode of a search agent with its K sampled candidates, the process
reward of each (NaN: unlabelled), and the index of the executed one."""


class JraggymProcess(Builder):
    """Writes records in the given order, and their digest into the metadata."""

    VERSION = tfds.core.Version(VERSION)

    def __init__(self, *, records: Iterable[ProcessRecord], **kwargs: Any):
        self._records = records
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=_DESCRIPTION,
            features=_features(),
            metadata=tfds.core.MetadataDict(),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {SPLIT: self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[str, dict[str, Any]]]:
        digest, seen = hashlib.sha256(), set[str]()
        for record in self._records:
            if record.id in seen:
                raise InputError(f"two records {record.id!r}", got="the same id", remedy="Give distinct example ids.")
            seen.add(record.id)
            digest.update(encode(record) + b"\n")
            yield record.id, to_example(record)
        if not seen:
            raise InputError("a dataset without records", got="none", remedy="Collect some first.")
        self.info.metadata["sha256"] = digest.hexdigest()


def _features() -> tfds.features.FeaturesDict:
    text = tfds.features.Text()
    # As bytes: a plain float feature is stored with 32 bits, and would not give back the number that was collected.
    number = tfds.features.Tensor(shape=(), dtype=np.float64, encoding=tfds.features.Encoding.BYTES)
    candidate = {"text": text, **dict.fromkeys(_NUMBERS, number), **dict.fromkeys(_LISTS, text)}
    return tfds.features.FeaturesDict(
        {
            **dict.fromkeys(("id", "example_id", "question", "state", "prompt"), text),
            "step": np.int32,
            "golds": tfds.features.Sequence(text),
            "candidates": tfds.features.Sequence(candidate),
            "chosen": np.int32,
            "outcome": {"em": number, "f1": number},
            "provenance": {**dict.fromkeys(("actor", "judge", "retriever", "version"), text), "seed": np.int64},
        }
    )


def to_example(record: ProcessRecord) -> dict[str, Any]:
    """A record as the dataset's fields."""
    return {
        "id": record.id,
        "example_id": record.example_id,
        "step": record.step,
        "question": record.question,
        "state": json.dumps(to_json(record.state), ensure_ascii=False),
        "prompt": record.prompt,
        "golds": list(record.golds),
        "candidates": [
            {
                "text": candidate.text,
                **{name: _or_nan(getattr(candidate, name)) for name in _NUMBERS},
                **{name: json.dumps(getattr(candidate, name), ensure_ascii=False) for name in _LISTS},
            }
            for candidate in record.candidates
        ],
        "chosen": record.chosen,
        "outcome": {"em": record.em, "f1": record.f1},
        "provenance": to_json(record.provenance),
    }


def from_example(example: Mapping[str, Any]) -> ProcessRecord:
    """The record that `to_example` wrote, as read back by tensorflow-datasets."""
    columns, provenance = example["candidates"], example["provenance"]
    numbers = [map(_or_none, columns[name]) for name in _NUMBERS]
    lists = [[tuple(json.loads(text)) for text in columns[name]] for name in _LISTS]
    texts = [text.decode() for text in columns["text"]]
    candidates = tuple(Candidate(*fields) for fields in zip(texts, *numbers, *lists, strict=True))
    return ProcessRecord(
        example_id=example["example_id"].decode(),
        step=int(example["step"]),
        state=state_from_json(json.loads(example["state"])),
        prompt=example["prompt"].decode(),
        golds=tuple(gold.decode() for gold in example["golds"]),
        candidates=candidates,
        chosen=int(example["chosen"]),
        em=float(example["outcome"]["em"]),
        f1=float(example["outcome"]["f1"]),
        provenance=Provenance(
            **{name: provenance[name].decode() for name in ("actor", "judge", "retriever", "version")},
            seed=int(provenance["seed"]),
        ),
    )


def _or_nan(number: float | None) -> float:
    return math.nan if number is None else number


def _or_none(number: Any) -> float | None:
    return None if math.isnan(number) else float(number)


@dataclass(frozen=True)
class ProcessSource:
    """The records of a dataset on disk, in their order, read one at a time."""

    directory: Path
    digest: str  # sha256 over the records
    examples: Any  # random access, by tensorflow-datasets

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> ProcessRecord:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)} in {self.directory}")
        try:
            return from_example(self.examples[int(index)])
        except Exception as error:  # a damaged file: the reader's exception depends on which byte it is
            raise _damaged(self.directory, f"record {index}: {error}") from error

    def __iter__(self) -> Iterator[ProcessRecord]:
        return (self[index] for index in range(len(self)))


def open_dataset(directory: str | Path) -> ProcessSource:
    """Opens what `build_dataset` wrote; raises InputError when it is not there, not whole or not readable."""
    directory = Path(directory)
    folder = directory / NAME / VERSION
    if not folder.is_dir():
        raise InputError(
            f"no process data in {directory}",
            got=f"no folder {NAME}/{VERSION}",
            remedy="Name another folder, or build it.",
        )
    try:
        builder = tfds.builder_from_directory(folder)
        source = ProcessSource(directory, builder.info.metadata["sha256"], builder.as_data_source(split=SPLIT))
        expected = builder.info.splits[SPLIT].num_examples
    except Exception as error:
        raise _damaged(directory, f"{type(error).__name__}: {error}") from error
    if len(source) != expected:
        raise _damaged(directory, f"{len(source)} records, not {expected}")
    return source


def build_dataset(directory: str | Path, records: Iterable[ProcessRecord]) -> ProcessSource:
    """Writes the records, once and in their order, and opens them; a whole dataset of the same records is kept.

    It is built in a hidden folder beside `directory` and renamed at the end, so that a kill leaves no half
    one there; what an earlier kill left is built anew. One process builds a directory at a time.

    Raises:
        InputError: there are other records, other files or a damaged dataset in `directory`, an id twice, no
            record at all, or no room to write.
    """
    directory = Path(directory)
    if directory.exists() and any(directory.iterdir()):
        return _kept(directory, records)
    building = directory.with_name(f".{directory.name}.building")
    try:
        if building.exists():
            shutil.rmtree(building)
        write_dataset(JraggymProcess, building, records=records)
        building.rename(directory)
    except OSError as error:
        raise InputError(f"cannot write {directory}", got=error, remedy="Make room or name another folder.") from error
    return open_dataset(directory)


def _kept(directory: Path, records: Iterable[ProcessRecord]) -> ProcessSource:
    """The whole dataset that is already there, when it holds the same records."""
    source, digest = open_dataset(directory), hashlib.sha256()
    for record in records:
        digest.update(encode(record) + b"\n")
    if source.digest != digest.hexdigest():
        raise InputError(
            f"{directory} holds a dataset of other records",
            got=f"sha256 {source.digest[:12]} there, {digest.hexdigest()[:12]} here",
            remedy="Name another folder, or remove that one.",
        )
    return source


def _damaged(directory: Path, got: str) -> InputError:
    return InputError(
        f"the dataset in {directory} is damaged", got=got, remedy="Remove that folder and build it again."
    )


def batches(
    source: Items[Any],
    *,
    batch_size: int,
    seed: int,
    to_batch: Callable[..., Any],
) -> Shuffled:
    """An endless random-access dataset: `batches(...)[step]` is a pure function of (source, seed, step).

    Every epoch is another order of all records, each once. Batches go on over the end of an epoch, so that
    all have `batch_size` records. To go on after a kill, read from the next step on. `to_batch` gets the records
    of a batch, or those of one process's part of it: no others are read.

    Raises:
        InputError: `batch_size` is below 1 or there is no record.
    """
    import grain  # it imports jax, which collecting does not need

    if batch_size < 1:
        raise InputError("a batch is too small", got=batch_size, remedy="Use batch_size=1 or more.")
    if not len(source):
        raise InputError("no process data to read", got="0 records", remedy="Collect some first.")
    return Shuffled(grain.MapDataset.source(source).seed(seed).shuffle().repeat(), batch_size, to_batch)


@dataclass(frozen=True)
class Shuffled:
    """See `batches`."""

    records: grain.MapDataset
    size: int
    to_batch: Callable[..., Any]

    def __getitem__(self, step: int) -> Any:
        return self.part(step, np.arange)[0]

    def part(self, step: int, own: Callable[[int], np.ndarray]) -> tuple[Any, int]:
        """One process's rows of a batch, and how many rows it has in all."""
        return self.to_batch([self.records[step * self.size + int(i)] for i in own(self.size)]), self.size

    def to_iter_dataset(self) -> grain.IterDataset:
        """All batches from the first on, read ahead by threads."""
        return self.records.batch(self.size, batch_fn=self.to_batch).to_iter_dataset()
