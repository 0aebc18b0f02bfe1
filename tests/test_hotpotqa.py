"""The HotpotQA readers, on records in the published format."""

import json
from pathlib import Path

import pytest

from jraggym.data.hotpotqa import read_official, read_pooled
from jraggym.errors import InputError

HOTPOT = Path(__file__).resolve().parents[1].parent / "shared" / "data" / "hotpotqa"
RECORD = {
    "_id": "5a",
    "question": "Who is the mayor of the town on the Tarvan?",
    "answer": "Ada Lindqvist",
    "type": "bridge",
    "level": "hard",
    "supporting_facts": [["Tarvan", 0], ["Morn", 1], ["Tarvan", 1]],
    "context": [["Tarvan", ["The Tarvan is a river.", " It flows by Morn."]], ["Morn", ["A town.", " Mayor: Ada."]]],
}
QUESTION = {"id": "5a", "question": "Who?", "answer": "Ada", "type": "bridge", "level": "hard", "gold_titles": ["A"]}


def without(name, record=RECORD):
    return {key: value for key, value in record.items() if key != name}


def test_official_records_become_examples_and_a_corpus(tmp_path):
    path = tmp_path / "h.json"
    second = RECORD | {"_id": "5b", "context": [["Morn", ["Another text."]], ["Sea", ["Salt."]]]}
    path.write_text(json.dumps([RECORD, second]))
    examples, corpus, brought, _ = read_official(path)
    assert brought == {"5a": ("Tarvan", "Morn"), "5b": ("Morn", "Sea")}
    assert [example.id for example in examples] == ["5a", "5b"]
    assert examples[0].support == ("Tarvan", "Morn")
    assert examples[0].answers == ("Ada Lindqvist",)
    assert examples[0].kind == "bridge"
    assert [document.id for document in corpus.documents] == ["Tarvan", "Morn", "Sea"]
    assert corpus[0].text == "The Tarvan is a river. It flows by Morn."
    assert corpus[1].text == "A town. Mayor: Ada."


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot read .*h.json"),
        ("{}", "h.json is no list of questions; got dict"),
        ("[]", "h.json is no list of questions"),
        ([RECORD, 3], "h.json, record 1 is no JSON object; got int"),
        ([without("answer")], "h.json, record 0: missing field; got answer"),
        ([RECORD | {"answer": " "}], "h.json, record 0: no gold answer"),
        ([RECORD | {"question": ""}], "h.json, record 0: no question"),
        ([RECORD | {"context": "x"}], "h.json, record 0: field of the wrong type; got context: str"),
        ([RECORD | {"context": [["a", "b", "c"]]}], "h.json, record 0: wrong entry in context"),
        ([RECORD | {"context": [["a", [1]]]}], "h.json, record 0: a sentence is no text"),
        ([RECORD | {"supporting_facts": ["Tarvan"]}], "h.json, record 0: wrong entry in supporting_facts"),
    ],
)
def test_a_bad_official_file_is_named(tmp_path, content, message):
    path = tmp_path / "h.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(InputError, match=message):
        read_official(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"cannot read .*absent"):
        read_official(tmp_path / "absent.json")


def write_pooled(folder, questions, titles=("A", "B")):
    corpus = [json.dumps({"title": title, "text": "t"}) for title in titles]
    (folder / "pooled_corpus.jsonl").write_text("\n".join(corpus))
    (folder / "pooled_questions.jsonl").write_text("\n".join(json.dumps(question) for question in questions))


def test_pooled_files(tmp_path):
    write_pooled(tmp_path, [QUESTION | {"gold_titles": ["B", "A", "B"]}])
    examples, corpus, *_ = read_pooled(tmp_path)
    assert examples[0].support == ("B", "A")
    assert len(corpus) == 2


@pytest.mark.parametrize(
    ("questions", "message"),
    [
        ([], "holds no question"),
        (
            [QUESTION, without("gold_titles", QUESTION)],
            "pooled_questions.jsonl, line 2: missing field; got gold_titles",
        ),
        ([QUESTION | {"gold_titles": ["Z"]}], r"line 1: gold title outside the corpus; got \['Z'\]"),
        ([QUESTION | {"gold_titles": [["A"]]}], r"line 1: gold title outside the corpus"),
        ([QUESTION | {"answer": ""}], "line 1: no gold answer"),
        ([QUESTION | {"answer": 3}], "line 1: field of the wrong type; got answer: int"),
    ],
)
def test_a_bad_pooled_file_is_named(tmp_path, questions, message):
    write_pooled(tmp_path, questions)
    with pytest.raises(InputError, match=message):
        read_pooled(tmp_path)


@pytest.mark.skipif(not HOTPOT.is_dir(), reason=f"needs the HotpotQA extract in {HOTPOT}")
def test_the_published_files_are_read():
    train = read_official(HOTPOT / "hotpot_train_subset.json")
    assert len(train.examples) == 377
    assert all(title in train.corpus for example in train.examples for title in example.support)
    pooled = read_pooled(HOTPOT)
    assert (len(pooled.examples), len(pooled.corpus)) == (500, 4937)
