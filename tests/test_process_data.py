"""Process data: chunks survive a kill, the dataset gives back every record, batches depend on (seed, step) alone.

Run as a script, this file is the collector that the kill tests kill: `test_process_data.py collect|build DIR`.
"""

import contextlib
import json
import math
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jraggym.data.process import (
    ChunkStore,
    ProcessRecord,
    Provenance,
    batches,
    build_dataset,
    open_dataset,
    record_from_json,
)
from jraggym.errors import InputError
from jraggym.types import Candidate, Document, Malformed, Search, State, Turn, to_json

CHUNKS, PER_CHUNK = 24, 4
SETTINGS = {"actor": "tiny", "chunk_size": PER_CHUNK, "seed": 7, "stops": ("a", "b")}


def make_record(question: int, step: int = 0, k: int = 3) -> ProcessRecord:
    """A record of its own for each question, with Unicode, every kind of turn and unlabelled candidates."""
    rng = random.Random(f"{question}/{step}")
    found = Document(f"d{question}", "Köln, 東京\u2028", "naïve 🚀 text\nline\r\nnext \x00 " * 20)
    turns = (Turn(Search(f"wer? {question}"), (found,)), Turn(Malformed("no tag"), (), "retriever down"))[:step]
    rewards = [0.0, None, rng.random()]
    return ProcessRecord(
        example_id=f"q{question}",
        step=step,
        state=State(f"Where is № {question}?", turns),
        prompt="<|user|>\nWhere?\n" * 10,
        golds=("Köln", "Cologne")[: 1 + question % 2],
        candidates=tuple(
            Candidate(
                f"<search>ü{i}</search>",
                rewards[i % 3],
                None if i == 1 else rng.random(),
                -1 / 3,
                ("d1",) * i,
                (7,) * i,
                (-1 / 7,) * i,
            )
            for i in range(k)
        ),
        chosen=k - 1,
        em=float(question % 2),
        f1=2 / 3,
        provenance=Provenance("actor", "judge", "bm25", 2**40 + question),
    )


def chunk_of(index: int) -> tuple[list[str], list[ProcessRecord]]:
    questions = range(index * PER_CHUNK, (index + 1) * PER_CHUNK)
    records = [make_record(q, step, k=1 + q % 5) for q in questions for step in range(1 + q % 3)]
    return [f"q{q}" for q in questions], records


def collect(directory: str) -> None:
    store = ChunkStore(directory, SETTINGS)
    print("ready", flush=True)
    for index in sorted(set(range(CHUNKS)) - store.done()):
        store.write(index, *chunk_of(index))
        time.sleep(0.002)


def many() -> list[ProcessRecord]:
    return [record for index in range(CHUNKS) for record in chunk_of(index)[1]]


def build(directory: str) -> None:
    print("ready", flush=True)
    build_dataset(directory, many())


def run_and_kill(job: str, directory: Path, seconds: float) -> bool:
    """Starts the job, kills it `seconds` after its first sign of life; True when it had finished before."""
    command = [sys.executable, __file__, job, str(directory)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == b"ready\n", process.stderr.read().decode()
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(seconds) == 0
        process.send_signal(signal.SIGKILL)
        return process.wait() == 0


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run."""
    directory = tmp_path_factory.mktemp("whole")
    collect(str(directory))
    return directory


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    directory = tmp_path_factory.mktemp("dataset") / "data"
    build_dataset(directory, many())
    return directory


# --- records


@pytest.mark.parametrize("step", [0, 1, 2])
def test_record_survives_json(step):
    record = make_record(3, step, k=5)
    assert record_from_json(json.loads(json.dumps(to_json(record)))) == record
    assert (record.id, record.question) == (f"q3/{step}", "Where is № 3?")


@pytest.mark.parametrize("change", [{"chosen": 3}, {"chosen": -1}, {"candidates": ()}, {"f1": math.inf}])
def test_record_refuses_nonsense(change):
    with pytest.raises(InputError, match="q1/0"):
        replace(make_record(1), **change)


@pytest.mark.parametrize("name", ["reward", "score", "logprob"])
def test_record_refuses_nan(name):
    numbers: dict[str, Any] = {name: math.nan}
    unlabelled = Candidate("a", **numbers)
    with pytest.raises(InputError, match=f"{name} of candidate 0 of record 'q1/0' is not finite.*None"):
        replace(make_record(1), candidates=(unlabelled,), chosen=0)


def test_record_of_another_shape_is_named():
    value = to_json(make_record(1))
    with pytest.raises(InputError, match="another shape"):
        record_from_json({**value, "colour": "red"})
    with pytest.raises(InputError, match=r"another shape.*golds"):
        record_from_json({name: field for name, field in value.items() if name != "golds"})


# --- chunks


def test_store_reads_back_in_chunk_order(tmp_path):
    store = ChunkStore(tmp_path / "new" / "store", SETTINGS)
    assert store.done() == set()
    for index in (2, 0, 1):
        store.write(index, *chunk_of(index))
    again = ChunkStore(tmp_path / "new" / "store", SETTINGS)
    assert again.done() == {0, 1, 2}
    assert list(again.read_all(3)) == [record for index in range(3) for record in chunk_of(index)[1]]


def test_question_without_records_stays_done(tmp_path):
    store = ChunkStore(tmp_path, SETTINGS)
    store.write(0, ["q0", "q1"], [])
    assert store.done() == {0}
    assert list(store.read_all()) == []


def test_other_settings_are_refused_with_both_sides(whole):
    before = files(whole)
    with pytest.raises(InputError, match=r"chunk-000000.jsonl.*seed: 7 there, 8 here.*temperature: 'nothing' there"):
        ChunkStore(whole, {**SETTINGS, "seed": 8, "temperature": 0.7})
    assert files(whole) == before


def test_chunk_is_never_overwritten(tmp_path):
    store = ChunkStore(tmp_path, SETTINGS)
    store.write(0, *chunk_of(0))
    before = files(tmp_path)
    with pytest.raises(InputError, match="chunk 0 is already"):
        store.write(0, *chunk_of(1))
    assert files(tmp_path) == before


def test_wrong_questions_are_refused(tmp_path):
    store = ChunkStore(tmp_path, SETTINGS)
    with pytest.raises(InputError, match=r"outside chunk 0; got \['q1'\]"):
        store.write(0, ["q0"], [make_record(1)])
    assert store.done() == set()
    store.write(0, ["q0", "q1"], [make_record(0)])
    store.write(1, ["q1"], [make_record(1)])
    with pytest.raises(InputError, match=r"'q1' is in two chunks.*0 and 1"):
        list(store.read_all())


@pytest.mark.parametrize(("chunks", "wrong"), [(None, "1"), (3, "1"), (4, "1, 3"), (1, "2")])
def test_missing_and_surplus_chunks_are_named(tmp_path, chunks, wrong):
    store = ChunkStore(tmp_path, SETTINGS)
    for index in (0, 2):
        store.write(index, *chunk_of(index))
    with pytest.raises(InputError, match=rf"other chunks than.*\[{wrong}\]"):
        list(store.read_all(chunks))


def test_every_damage_to_a_chunk_is_named(tmp_path):
    """Cut anywhere or with one bit flipped anywhere, a chunk is refused by name, and its file stays."""
    store = ChunkStore(tmp_path, SETTINGS)
    store.write(0, ["q0"], [make_record(0)])
    path, rng = tmp_path / "chunk-000000.jsonl", random.Random(0)
    good = path.read_bytes()
    spots = [0, *rng.sample(range(len(good)), 60), len(good) - 1]
    flipped = [good[:spot] + bytes([good[spot] ^ 1 << rng.randrange(8)]) + good[spot + 1 :] for spot in spots]
    for content in [good[:spot] for spot in spots] + flipped + [good + b"{}\n"]:
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"chunk-000000.jsonl.*(Remove this file|other settings)"):
            list(store.read_all())
        assert path.read_bytes() == content
    path.write_bytes(good)
    assert list(store.read_all()) == [make_record(0)]


def test_damage_shows_before_collecting_goes_on(tmp_path):
    ChunkStore(tmp_path, SETTINGS).write(0, *chunk_of(0))
    path = tmp_path / "chunk-000000.jsonl"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(InputError, match=r"damaged; got \d+ bytes, not \d+"):
        ChunkStore(tmp_path, SETTINGS)


def test_unwritable_places_and_texts_are_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="no folder can be made"):
        ChunkStore(tmp_path / "file" / "store", SETTINGS)
    store = ChunkStore(tmp_path / "store", SETTINGS)
    with pytest.raises(InputError, match=r"q1/0.*surrogates"):
        store.write(0, ["q1"], [replace(make_record(1), prompt="\ud800")])
    (tmp_path / "store").rmdir()
    with pytest.raises(InputError, match="cannot write"):
        store.write(0, *chunk_of(0))


def test_killed_and_resumed_collecting_equals_an_uninterrupted_one(tmp_path, whole):
    """Real SIGKILLs at random moments: no question is lost or repeated, and the files are the same bytes."""
    rng, kills, sizes = random.Random(1), 0, []
    while not run_and_kill("collect", tmp_path, rng.uniform(0.0, 0.03) if kills < 4 else 30.0):
        kills += 1
        sizes.append(len(ChunkStore(tmp_path, SETTINGS).done()))
        assert kills < 20, "the collector never finishes"
    assert kills >= 4, f"the collector was too fast to be killed: {sizes}"
    assert any(0 < size < CHUNKS for size in sizes), f"no kill in the middle: {sizes}"
    assert files(tmp_path) == files(whole)
    records = list(ChunkStore(tmp_path, SETTINGS).read_all(CHUNKS))
    assert records == many()
    assert len({record.id for record in records}) == len(records)


# --- the dataset


def test_dataset_gives_back_every_record_exactly(dataset, capfd):
    source = open_dataset(dataset)
    assert len(source) == len(many())
    assert list(source) == many()
    assert source[5] == many()[5]
    assert {len(record.candidates) for record in source} == {1, 2, 3, 4, 5}
    with pytest.raises(IndexError):
        source[len(source)]


def test_building_is_quiet(tmp_path, capfd):
    build_dataset(tmp_path / "data", many()[:3])
    assert capfd.readouterr() == ("", "")


def test_plain_tensorflow_datasets_reads_it(dataset):
    """Someone without this library opens it by folder and by name, and needs no TensorFlow."""
    code = """
import json, math, sys
import tensorflow_datasets as tfds
folder = sys.argv[1]
by_folder = tfds.builder_from_directory(folder + "/jraggym_process/2.0.0").as_data_source(split="train")
by_name = tfds.data_source("jraggym_process", data_dir=folder, split="train")
assert not {"jraggym", "tensorflow"} & set(sys.modules), "not a plain reader"
record = by_folder[4]
assert by_name[4]["id"] == record["id"]
columns = record["candidates"]
nan = [bool(math.isnan(reward)) for reward in columns["reward"]]
turns = json.loads(record["state"])["turns"]
print(json.dumps([len(by_folder), record["id"].decode(), columns["text"][1].decode(), nan, len(turns)]))
"""
    done = subprocess.run([sys.executable, "-c", code, str(dataset)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    record = many()[4]
    unlabelled = [candidate.reward is None for candidate in record.candidates]
    expected = [len(many()), record.id, "<search>ü1</search>", unlabelled, len(record.state.turns)]
    assert json.loads(done.stdout) == expected


def test_a_whole_dataset_is_kept_and_other_records_are_refused(tmp_path):
    directory, records = tmp_path / "data", many()[:5]
    build_dataset(directory, records)
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*")}
    assert list(build_dataset(directory, iter(records))) == records
    with pytest.raises(InputError, match="other records"):
        build_dataset(directory, records[:4])
    assert {path: path.stat().st_mtime_ns for path in directory.rglob("*")} == before


def test_a_failing_build_leaves_nothing_and_can_be_repeated(tmp_path):
    def broken():
        yield make_record(0)
        raise RuntimeError("collecting broke")

    directory = tmp_path / "data"
    with pytest.raises(RuntimeError, match="collecting broke"):
        build_dataset(directory, broken())
    with pytest.raises(InputError, match="no process data"):
        open_dataset(directory)
    assert list(build_dataset(directory, [make_record(0)])) == [make_record(0)]


@pytest.mark.parametrize(
    ("records", "message"), [([], "without records"), ([make_record(0), make_record(0)], "two records 'q0/0'")]
)
def test_bad_records_are_refused(tmp_path, records, message):
    with pytest.raises(InputError, match=message):
        build_dataset(tmp_path / "data", records)
    assert not (tmp_path / "data").exists()


def test_killed_building_can_be_repeated(tmp_path):
    directory = tmp_path / "data"
    for seconds in (0.01, 0.03, 0.06):
        if not run_and_kill("build", directory, seconds) and directory.exists():
            assert list(open_dataset(directory)) == many(), "a half dataset under the final name"
    assert list(build_dataset(directory, many())) == many()
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_damage_to_a_dataset_is_named(tmp_path):
    directory = tmp_path / "data"
    build_dataset(directory, many()[:8])
    for path in [path for path in directory.rglob("*") if path.is_file()]:
        good = path.read_bytes()
        for content in (good[: len(good) // 2], b""):
            path.write_bytes(content)
            with pytest.raises(InputError, match=r"damaged.*Remove that folder"):
                list(open_dataset(directory))
        path.write_bytes(good)


def test_no_flipped_bit_changes_a_record(tmp_path):
    directory = tmp_path / "data"
    build_dataset(directory, many()[:8])
    (path,) = directory.rglob("*array_record*")
    good, messages = path.read_bytes(), []
    inside = [spot for spot in range(len(good)) if good[spot]]  # the rest is padding between blocks
    for spot in random.Random(0).sample(inside, 40):
        path.write_bytes(good[:spot] + bytes([good[spot] ^ 4]) + good[spot + 1 :])
        try:
            assert list(open_dataset(directory)) == many()[:8], f"the flipped byte {spot} changed a record"
        except InputError as error:
            messages.append(str(error))
    assert len(messages) >= 20, f"only {len(messages)} of 40 flipped bits were noticed"
    assert all("Remove that folder" in message for message in messages)


# --- batches


def ids(source, seed=0, size=4) -> Any:
    def to_batch(records) -> Any:
        return tuple(record.id for record in records)

    return batches(source, batch_size=size, seed=seed, to_batch=to_batch)


def test_batch_is_a_function_of_seed_and_step(dataset):
    one, other = ids(open_dataset(dataset)), ids(open_dataset(dataset))
    steps = [0, 1, 7, 46, 1000, 10**9]
    forwards = {step: one[step] for step in steps}
    assert forwards == {step: other[step] for step in reversed(steps)}
    assert [one[step] for step in range(8)] != [ids(open_dataset(dataset), seed=1)[step] for step in range(8)]


def test_every_record_once_per_epoch_in_another_order(dataset):
    source = open_dataset(dataset)
    size = 10
    stream = ids(source, size=size)
    n = len(source)
    flat = [name for step in range(math.ceil(3 * n / size)) for name in stream[step]]
    epochs = [flat[i * n : (i + 1) * n] for i in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == sorted(record.id for record in source)
    assert len({tuple(epoch) for epoch in epochs}) == 3, "an epoch repeats the order of another"
    assert all(len(stream[step]) == size for step in range(30)), "a short batch at the end of an epoch"


def test_prefetching_iterator_agrees(dataset):
    stream = ids(open_dataset(dataset))
    iterator = iter(stream.to_iter_dataset())
    assert [next(iterator) for _ in range(5)] == [stream[step] for step in range(5)]


def test_batches_refuse_nonsense(dataset):
    with pytest.raises(InputError, match="too small"):
        ids(open_dataset(dataset), size=0)
    with pytest.raises(InputError, match="no process data"):
        ids([])


if __name__ == "__main__":
    {"collect": collect, "build": build}[sys.argv[1]](sys.argv[2])
