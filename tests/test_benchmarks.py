"""Benchmarks by name: splits, the built form, and a build that is killed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tensorflow_datasets as tfds

from jraggym.data import benchmarks
from jraggym.data.benchmarks import BENCHMARKS, find_file, load_benchmark
from jraggym.errors import InputError

DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"
EXTRACTS = [
    ("hotpotqa", "hotpotqa", "train"),
    ("hotpotqa", "hotpotqa", "dev"),
    ("twowiki", "2wikimultihopqa", "test1000"),
    ("musique", "musique", "dev"),
    ("medqa", "medqa", "train1000"),
    ("pubmedqa", "pubmedqa", "labelled"),
]


def hotpot(number, text="text"):
    """A question with a paragraph that all questions bring, and one of its own."""
    return {
        "_id": f"q{number}",
        "question": f"Who is {number}, naïvely? 東京",
        "answer": "Ada",
        "type": "bridge",
        "level": "hard",
        "supporting_facts": [[f"T{number}", 0]],
        "context": [["all", [text]], [f"T{number}", [f"{number}."]]],
    }


def write_hotpot(folder, count, name="hotpot_dev_distractor_v1.json"):
    (folder / name).write_text(json.dumps([hotpot(i) for i in range(count)]))
    return folder


@pytest.fixture
def short(monkeypatch):
    """The paper's splits with two questions in place of 1,000."""
    parts = {"train1000": ("dev", slice(None, 2)), "test1000": ("dev", slice(-2, None))}
    benchmark = BENCHMARKS["hotpotqa"]
    monkeypatch.setitem(BENCHMARKS, "hotpotqa", benchmarks.Benchmark(benchmark.read, benchmark.files, parts))


@pytest.mark.parametrize("built", [False, True])
def test_the_splits_of_the_paper_are_the_first_and_the_last_questions(tmp_path, short, built):
    folder = write_hotpot(tmp_path, 5)
    where = tmp_path / "built" if built else None
    train, test, whole = (load_benchmark("hotpotqa", folder, s, where) for s in ("train1000", "test1000", "dev"))
    assert [example.id for example in train.examples] == ["q0", "q1"]
    assert [example.id for example in test.examples] == ["q3", "q4"]
    assert [document.id for document in test.corpus.documents] == ["all", "T3", "T4"]  # of its own questions
    assert (len(whole.examples), len(whole.corpus)) == (5, 6)
    assert train.notes == test.notes == whole.notes == ()


@pytest.mark.parametrize("split", ["train1000", "test1000"])
@pytest.mark.parametrize("count", [1, 3])
def test_splits_that_would_share_questions_are_refused(tmp_path, short, split, count):
    with pytest.raises(InputError, match=f"of hotpotqa would overlap; got 1 of {count} questions in both"):
        load_benchmark("hotpotqa", write_hotpot(tmp_path, count), split)


def test_four_questions_are_just_enough(tmp_path, short):
    folder = write_hotpot(tmp_path, 4)
    ids = [e.id for split in ("train1000", "test1000") for e in load_benchmark("hotpotqa", folder, split).examples]
    assert ids == ["q0", "q1", "q2", "q3"]


def test_the_full_splits_are_the_papers():
    """First and last 1,000 of HotpotQA's 7,405 and last 1,000 of 2WikiMultihopQA's 12,576 (RAG-Gym, appendix C)."""
    plain, part = BENCHMARKS["hotpotqa"].parts["train1000"]
    assert (plain, range(7405)[part]) == ("dev", range(1000))
    plain, part = BENCHMARKS["hotpotqa"].parts["test1000"]
    assert (plain, range(7405)[part]) == ("dev", range(6405, 7405))
    plain, part = BENCHMARKS["twowiki"].parts["test1000"]
    assert (plain, range(12576)[part]) == ("dev", range(11576, 12576))
    assert BENCHMARKS["medqa"].parts == {"train1000": ("train", slice(None, 1000))}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("trivia", "dev"), "unknown benchmark; got 'trivia'. Use one of hotpotqa, twowiki, musique"),
        (("hotpotqa", "test"), "unknown split of hotpotqa; got 'test'. Use one of train, dev, train1000, test1000"),
        (("hotpotqa", "train"), "no hotpotqa train file in .*Put the official hotpot_train.*json there"),
        (("bamboogle", "test"), "no bamboogle test file"),
    ],
)
def test_what_is_not_there_is_named(tmp_path, arguments, message):
    name, split = arguments
    with pytest.raises(InputError, match=message):
        load_benchmark(name, write_hotpot(tmp_path, 3), split)


@pytest.mark.parametrize(
    ("name", "split", "file"),
    [
        ("hotpotqa", "train", "hotpot_train_v1.1.json"),
        ("hotpotqa", "dev", "hotpot_dev_fullwiki_v1.json"),
        ("twowiki", "train", "train.json"),
        ("twowiki", "dev", "dev.json"),
        ("musique", "dev", "musique_ans_v1.0_dev.jsonl"),
        ("musique", "train", "musique_full_v1.0_train.jsonl"),
        ("bamboogle", "test", "Bamboogle Prerelease - Sheet1.csv"),
        ("bamboogle", "test", "bamboogle.json"),
        ("medqa", "test", "phrases_no_exclude_test.jsonl"),
        ("medqa", "dev", "dev.jsonl"),
        ("pubmedqa", "labelled", "ori_pqal.json"),
    ],
)
def test_files_are_found_under_their_published_names(tmp_path, name, split, file):
    (tmp_path / file).touch()
    assert find_file(name, tmp_path, split) == tmp_path / file


def test_one_of_several_files_is_chosen_by_its_name_or_not_at_all(tmp_path):
    for file in ("hotpot_dev_fullwiki_v1.json", "hotpot_dev_distractor_v1.json", "dev.json", "dev_old.json"):
        (tmp_path / file).touch()
    assert find_file("hotpotqa", tmp_path, "dev").name == "hotpot_dev_distractor_v1.json"
    with pytest.raises(InputError, match=r"several twowiki dev files in .*; got dev.json, dev_old.json"):
        find_file("twowiki", tmp_path, "dev")


def test_medqa_has_no_corpus_and_keeps_its_options_when_built(tmp_path):
    record = {"question": "Which?", "options": {"A": "x", "B": "y"}, "answer": "x", "answer_idx": "A"}
    (tmp_path / "test.jsonl").write_text(json.dumps(record))
    read, built = (load_benchmark("medqa", tmp_path, "test", where) for where in (None, tmp_path / "built"))
    assert read == built
    assert built.examples[0].options == (("A", "x"), ("B", "y"))
    assert len(built.corpus) == 0


@pytest.mark.skipif(not DATA.is_dir(), reason=f"needs the extracts of the benchmarks in {DATA}")
@pytest.mark.parametrize(("name", "folder", "split"), EXTRACTS)
def test_what_is_built_equals_what_is_read(tmp_path, name, folder, split):
    read, first, again = (
        load_benchmark(name, DATA / folder, split, where) for where in (None, tmp_path / "b", tmp_path / "b")
    )
    assert read == first == again


@pytest.mark.skipif(not DATA.is_dir(), reason=f"needs the extracts of the benchmarks in {DATA}")
def test_a_file_with_fewer_questions_is_taken_whole_with_a_note():
    questions = load_benchmark("twowiki", DATA / "2wikimultihopqa", "test1000")
    assert len(questions.examples) == 500
    assert questions.notes == ("test1000 has 500 questions instead of 1000",)
    with pytest.raises(InputError, match="would overlap; got 277 of 277"):
        load_benchmark("hotpotqa", DATA / "hotpotqa", "test1000")


def test_the_notes_of_the_reader_are_kept(tmp_path):
    record = {"id": "2hop__1", "question": "q", "answer": "a", "answer_aliases": [], "paragraphs": []}
    records = [record | {"answerable": True}, record | {"answerable": False, "id": "2hop__2"}]
    (tmp_path / "musique_ans_v1.0_dev.jsonl").write_text("\n".join(map(json.dumps, records)))
    for _ in range(2):
        questions = load_benchmark("musique", tmp_path, "dev", tmp_path / "built")
        assert questions.notes == ("1 unanswerable questions are left out",)


def test_the_built_form_stands_for_itself_and_is_readable_by_anyone(tmp_path):
    folder, built = write_hotpot(tmp_path, 3), tmp_path / "built"
    before = load_benchmark("hotpotqa", folder, "dev", built)
    (folder / "hotpot_dev_distractor_v1.json").unlink()
    assert load_benchmark("hotpotqa", folder, "dev", built) == before
    source = tfds.data_source("hotpotqa", split="dev", data_dir=built / "hotpotqa-dev")
    assert [record["id"].decode() for record in source] == ["q0", "q1", "q2"]


def test_what_was_built_from_another_file_is_refused(tmp_path):
    folder, built = write_hotpot(tmp_path, 3), tmp_path / "built"
    load_benchmark("hotpotqa", folder, "dev", built)
    write_hotpot(tmp_path, 4)
    with pytest.raises(InputError, match=r"hotpotqa-dev was built from another file than .*distractor"):
        load_benchmark("hotpotqa", folder, "dev", built)


@pytest.mark.parametrize("pattern", ["*.array_record*", "dataset_info.json", "features.json"])
def test_a_damaged_dataset_is_named(tmp_path, pattern):
    folder, built = write_hotpot(tmp_path, 3), tmp_path / "built"
    load_benchmark("hotpotqa", folder, "dev", built)
    (file,) = built.rglob(pattern)
    file.write_bytes(file.read_bytes()[:10])
    with pytest.raises(InputError, match=r"the dataset in .*hotpotqa-dev is damaged"):
        load_benchmark("hotpotqa", folder, "dev", built)


def test_a_flipped_bit_gives_an_error_or_changes_nothing(tmp_path):
    folder, built = write_hotpot(tmp_path, 3), tmp_path / "built"
    before = load_benchmark("hotpotqa", folder, "dev", built)
    (file,) = built.rglob("*.array_record*")
    content, errors = file.read_bytes(), 0
    places = [at for at, byte in enumerate(content) if byte][::60]  # the rest is padding
    for at in places:
        file.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        try:
            assert load_benchmark("hotpotqa", folder, "dev", built) == before
        except InputError as error:
            assert "hotpotqa-dev is damaged" in str(error)  # noqa: PT017
            errors += 1
    assert errors > len(places) / 2


def kill_while_building(folder, built):
    """For a child process: ends it, as a kill does, before the third record."""
    convert, seen = benchmarks.to_record, []

    def to_record(example, documents):
        seen.append(example)
        if len(seen) == 3:
            os._exit(9)
        return convert(example, documents)

    benchmarks.to_record = to_record
    load_benchmark("hotpotqa", folder, "dev", built)


def test_a_killed_build_leaves_nothing_that_loads_and_is_made_again(tmp_path):
    folder, built = write_hotpot(tmp_path, 5), tmp_path / "built"
    child = subprocess.run([sys.executable, __file__, str(folder), str(built)], capture_output=True, check=False)
    assert child.returncode == 9, child.stderr.decode()
    assert not (built / "hotpotqa-dev").exists()
    assert (built / ".hotpotqa-dev.building").exists(), "the kill came before the build"
    assert load_benchmark("hotpotqa", folder, "dev", built) == load_benchmark("hotpotqa", folder, "dev")
    assert [path.name for path in built.iterdir()] == ["hotpotqa-dev"]


if __name__ == "__main__":
    kill_while_building(*sys.argv[1:])
