"""Corpora from dumps: where texts are cut, what is written, and a run that is killed.

Run as a script, this file is the job that the tests kill: `test_corpora.py CORPUS SOURCE LINES`.
"""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jraggym.chats.local import Local
from jraggym.data import corpora
from jraggym.data.corpora import chunks, write_chunks
from jraggym.errors import InputError
from jraggym.recipes.qa import Qa, open_questions, open_retriever
from jraggym.retrieval.corpus import Corpus
from jraggym.types import Document

ROOT = Path(__file__).resolve().parents[1]
MEDQUAD = ROOT.parent / "shared" / "data" / "medquad" / "corpus.jsonl"
TEXT = 'One two three. Four five?  "Six seven." (Eight) nine\nten! and eleven. Twelve\n\nthirteen'


def dump(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def article(number, sentences=4):
    text = " ".join(f"Sentence {i} of article {number} is here." for i in range(sentences))
    return {"title": f"Article {number % 40}", "text": text, "url": "https://example.org"}


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def left_in(folder):
    return sorted(file.name for file in folder.iterdir())


@pytest.mark.parametrize(
    ("words", "overlap", "expected"),
    [
        (99, 0, ['One two three. Four five? "Six seven." (Eight) nine ten! and eleven. Twelve thirteen']),
        (5, 0, ["One two three. Four five?", '"Six seven."', "(Eight) nine ten! and eleven.", "Twelve thirteen"]),
        (
            5,
            2,
            [
                "One two three. Four five?",
                'Four five? "Six seven."',
                "(Eight) nine ten! and eleven.",
                "Twelve thirteen",
            ],
        ),
        (3, 0, ["One two three.", "Four five?", '"Six seven."', "(Eight) nine ten!", "and eleven. Twelve", "thirteen"]),
    ],
)
def test_texts_are_cut_at_sentence_ends(words, overlap, expected):
    assert list(chunks(TEXT, words, overlap)) == expected


def test_the_overlap_is_whole_sentences_and_leaves_room():
    assert list(chunks("A b. C d. E f. G h.", 6, 4)) == ["A b. C d. E f.", "C d. E f. G h."]
    assert list(chunks("A b. C d. E f. G h.", 6, 3)) == ["A b. C d. E f.", "E f. G h."]
    assert list(chunks("A b. C d. E f g h i.", 6, 4)) == ["A b. C d.", "E f g h i."]


def test_a_blank_text_has_no_chunk():
    assert list(chunks(" \n ", 5, 2)) == []


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 12), st.sampled_from([". ", "? ", "\n\n", ", ", " "])), max_size=12),
    st.integers(1, 10),
    st.data(),
)
def test_chunks_are_runs_of_words_that_together_hold_all(sentences, words, data):
    """Words are numbers, so that a chunk tells where it is from."""
    overlap, number, text = data.draw(st.integers(0, words - 1)), 0, ""
    for length, end in sentences:
        text += " ".join(str(number + i) for i in range(length)) + end
        number += length
    runs = [[int(word.strip(".?,")) for word in chunk.split()] for chunk in chunks(text, words, overlap)]
    assert all(run == list(range(run[0], run[-1] + 1)) and len(run) <= words for run in runs)
    assert sorted({word for run in runs for word in run}) == list(range(number))
    for before, after in itertools.pairwise(runs):
        assert before[0] < after[0]
        assert before[-1] < after[-1]
        assert before[-1] + 1 - after[0] <= overlap


def test_ids_count_the_chunks_of_a_document_and_repeated_texts_are_left_out(tmp_path):
    rows = [
        {"title": "Paris", "text": "A city. It is old."},
        {"title": "Troy", "text": "It is old. A town.", "url": "x"},
        {"title": "Paris", "text": "A hero."},
        {"title": "Köln", "text": "東京. A city.", "id": "k1"},
        {"title": "Empty", "text": " "},
    ]
    first, second = dump(tmp_path / "a.jsonl", rows[:2]), dump(tmp_path / "b.jsonl", rows[2:])
    path = write_chunks([first, second], tmp_path / "out" / "c.jsonl", words=3, overlap=0)
    assert Corpus.from_jsonl(path).documents == (
        Document("Paris#1", "Paris", "A city."),
        Document("Paris#2", "Paris", "It is old."),
        Document("Troy#2", "Troy", "A town."),  # Troy#1 is Paris#2
        Document("Paris#3", "Paris", "A hero."),
        Document("k1#1", "Köln", "東京. A city."),
    )
    assert "東京" in path.read_text(encoding="utf-8")
    assert left_in(path.parent) == ["c.jsonl", "c.jsonl.made"], "nothing but the chunks stays"


def test_what_is_there_is_kept_and_never_taken_for_that_of_other_settings_or_sources(tmp_path):
    source, path = dump(tmp_path / "a.jsonl", [article(0), article(1)]), tmp_path / "out" / "c.jsonl"
    assert write_chunks([source], path, words=10, overlap=0) == path
    when = path.stat().st_mtime_ns
    assert write_chunks([str(source)], str(path), words=10, overlap=0) == path
    assert path.stat().st_mtime_ns == when
    for words, overlap in ((9, 0), (10, 1)):
        with pytest.raises(InputError, match=r"c\.jsonl holds something else; got other sources or settings"):
            write_chunks([source], path, words=words, overlap=overlap)
    dump(source, [article(0), article(2)])
    with pytest.raises(InputError, match="holds something else"):
        write_chunks([source], path, words=10, overlap=0)
    assert path.stat().st_mtime_ns == when


@pytest.mark.parametrize("stop", [6, 30, 100])
def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path, stop, monkeypatch):
    monkeypatch.setattr(corpora, "COMMIT", 3)
    sources = [dump(tmp_path / f"{i}.jsonl", map(article, range(i, 100 + i))) for i in (0, 50)]
    whole = write_chunks(sources, tmp_path / "whole" / "c.jsonl", words=12, overlap=6)
    arguments = [sys.executable, __file__, str(tmp_path / "killed" / "c.jsonl"), *map(str, sources), str(stop)]
    child = subprocess.run(arguments, capture_output=True, check=False)
    assert child.returncode == 9, child.stderr.decode()
    (part,) = (tmp_path / "killed").glob("*.part")
    assert 0 < part.stat().st_size < whole.stat().st_size
    with part.open("ab") as file:
        file.write(b'{"id": "half a li')  # written, and not committed
    told: list[int] = []
    again = write_chunks(sources, tmp_path / "killed" / "c.jsonl", words=12, overlap=6, progress=told.append)
    assert again.read_bytes() == whole.read_bytes()
    assert told[0] == (stop + 3 if stop < 100 else 3), "it began anew"
    assert told[-1] == 100
    assert left_in(again.parent) == ["c.jsonl", "c.jsonl.made"]


def test_a_part_that_lost_bytes_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "COMMIT", 3)
    source = dump(tmp_path / "a.jsonl", [*map(article, range(10)), {"title": "x"}])
    for message in ("a.jsonl, line 11: missing field; got text", r"\.part is damaged; got less than \d+ bytes"):
        with pytest.raises(InputError, match=message):
            write_chunks([source], tmp_path / "out" / "c.jsonl", words=12, overlap=6)
        (part,) = (tmp_path / "out").glob("*.part")
        part.write_bytes(b"")


def test_memory_does_not_grow_with_the_dump(tmp_path):
    source = dump(tmp_path / "a.jsonl", (article(i, sentences=30) for i in range(1500)))
    assert source.stat().st_size > 1_500_000
    tracemalloc.start()
    try:
        write_chunks([source], tmp_path / "out" / "c.jsonl", words=60, overlap=10)
        assert tracemalloc.get_traced_memory()[1] < 800_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "a.jsonl, line 1 is not JSON"),
        (b'{"title": "a", "text": "b"}\n\n[]', "a.jsonl, line 3 is no JSON object"),
        (b'{"title": "a"}', "a.jsonl, line 1: missing field; got text"),
        (b'{"title": "a", "text": 3}', "a.jsonl, line 1: field is no text; got str, str, int"),
        (b'{"title": "a", "text": "b", "id": 3}', "line 1: field is no text; got int, str, str"),
        (b'{"title": "a", "text": "\xff"}', "a.jsonl, line 1 is no UTF-8"),
        (b"", "no text to cut; got 1 files without any"),
        (b'{"title": "a", "text": " "}', "no text to cut"),
    ],
)
def test_a_bad_dump_is_named(tmp_path, content, message):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(InputError, match=message):
        write_chunks([tmp_path / "a.jsonl"], tmp_path / "out" / "c.jsonl")
    assert not list((tmp_path / "out").glob("*.jsonl"))


def test_bad_settings_files_and_folders_are_named(tmp_path):
    source = dump(tmp_path / "a.jsonl", [article(0)])
    for sources, words, overlap in (([], 9, 0), ([source], 0, 0), ([source], 9, 9), ([source], 9, -1)):
        with pytest.raises(InputError, match=f"got {len(sources)} sources, words={words}, overlap={overlap}"):
            write_chunks(sources, tmp_path / "out" / "c.jsonl", words=words, overlap=overlap)
    with pytest.raises(InputError, match=r"cannot read .*absent"):
        write_chunks([tmp_path / "absent"], tmp_path / "out" / "c.jsonl")
    with pytest.raises(InputError, match=r"cannot write chunks into .*a\.jsonl"):
        write_chunks([source], source / "c.jsonl")
    with pytest.raises(InputError, match=r"a\.jsonl holds something else"):
        write_chunks([source], source)


def test_a_text_may_stand_in_another_field(tmp_path):
    rows = [{"id": "Anatomy_0", "title": "Anatomy", "content": "One two. Three four.", "contents": "Anatomy. One two."}]
    source = dump(tmp_path / "textbook.jsonl", rows)
    with pytest.raises(InputError, match=r"missing field; got text.*--text-field names another one"):
        write_chunks([source], tmp_path / "no.jsonl")
    made = write_chunks([source], tmp_path / "made.jsonl", field="content")
    assert read(made) == [{"id": "Anatomy_0#1", "title": "Anatomy", "text": "One two. Three four."}]
    with pytest.raises(InputError, match="holds something else"):
        write_chunks([source], made, field="contents")


# ---------------------------------------------------------------- the command


def command(*words):
    words = [sys.executable, "-m", "train.chunk", *map(str, words)]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("end", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 75)])
def test_the_command_is_killed_goes_on_and_its_file_is_what_evaluations_search(tmp_path, end, code):
    source, path = dump(tmp_path / "wiki.jsonl", map(article, range(8_000))), tmp_path / "corpora" / "wiki.jsonl"
    whole = write_chunks([source], tmp_path / "whole.jsonl", words=12, overlap=6)
    path.parent.mkdir()
    arguments = [source, "--out", path, "--words", 12, "--overlap", 6]
    with subprocess.Popen([sys.executable, "-m", "train.chunk", *map(str, arguments)], cwd=ROOT) as child:
        while not any(part.stat().st_size for part in path.parent.glob("*.part")) and child.poll() is None:
            time.sleep(0.01)
        child.send_signal(end)
        assert child.wait(60) == code
    done = command(*arguments)
    assert (done.returncode, done.stdout) == (0, f"{path}\n"), done.stderr
    assert path.read_bytes() == whole.read_bytes()
    assert "wiki.jsonl" in done.stderr

    qa = Qa(Local("no model"), corpus=path, limit=1, documents=3)
    corpus = open_questions(qa).corpus
    [hits] = open_retriever(qa, corpus, tmp_path)(["Sentence 2 of article 1234"])
    assert "article 1234 " in hits[0].text

    other = command(*arguments[:-1], 5)
    assert other.returncode == 2
    assert re.search(r"^error: .*wiki\.jsonl holds something else", other.stderr, re.MULTILINE)


@pytest.mark.skipif(not MEDQUAD.is_file(), reason=f"needs the corpus {MEDQUAD}")
def test_a_real_corpus(tmp_path):
    corpus = Corpus.from_jsonl(write_chunks([MEDQUAD], tmp_path / "c.jsonl", words=100, overlap=20))
    rows = read(MEDQUAD)
    assert {document.title for document in corpus.documents} <= {row["title"] for row in rows}
    assert len(corpus) > len({row["text"] for row in rows})
    assert len({document.text for document in corpus.documents}) == len(corpus)
    assert max(len(document.text.split()) for document in corpus.documents) == 100
    kept = {word for document in corpus.documents for word in document.text.split()}
    assert kept == {word for row in rows for word in row["text"].split()}


if __name__ == "__main__":
    path, *files, lines = sys.argv[1:]
    corpora.COMMIT = 3
    write_chunks(files, path, words=12, overlap=6, progress=lambda n: os._exit(9) if n >= int(lines) else None)
