"""The readers of the benchmarks' official files, on records in the published formats and on real extracts."""

import json
from pathlib import Path

import pytest

from jraggym.data import bamboogle, hotpotqa, medqa, musique, pubmedqa, twowiki
from jraggym.data.questions import NO_CORPUS, QuestionSet, gathered
from jraggym.errors import InputError
from jraggym.retrieval.corpus import Corpus
from jraggym.types import Document, Example

DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"needs the extracts of the benchmarks in {DATA}")

TWOWIKI = {
    "_id": "a1",
    "type": "compositional",
    "question": "Where was Ada's father buried?",
    "context": [["Ada", ["Ada is a chemist.", " Her father is Olof."]], ["Olof", ["He lies in Morn."]], ["Sea", []]],
    "supporting_facts": [["Ada", 1], ["Olof", 7], ["Ada", 0]],  # 7: out of range, as in the originals
    "evidences": [["Ada", "father", "Olof"], ["Olof", "place of burial", "Morn"]],
    "answer": "Morn",
}
MUSIQUE = {
    "id": "3hop1__1_2_3",
    "paragraphs": [
        {"idx": 0, "title": "Paris", "paragraph_text": "A city.", "is_supporting": True},
        {"idx": 1, "title": "Paris", "paragraph_text": "A hero.", "is_supporting": False},
        {"idx": 2, "title": "Troy", "paragraph_text": "A town.", "is_supporting": True},
    ],
    "question": "Who?",
    "question_decomposition": [],
    "answer": "Ada",
    "answer_aliases": ["Ada L.", "Ada", " "],
    "answerable": True,
}
MEDQA = {
    "question": "Which vitamin? ",
    "options": {"A": "Vitamin C", "B": "Vitamin D"},
    "answer": "Vitamin D",
    "answer_idx": "B",
    "meta_info": "step1",
}
PUBMEDQA = {
    "QUESTION": "Does it help?",
    "CONTEXTS": ["We asked. ", "It helped 7 of 9."],
    "LABELS": ["BACKGROUND", "RESULTS"],
    "final_decision": "maybe",
    "LONG_ANSWER": "Perhaps.",
}
BAMBOOGLE = {"Question": "Who was, then?", "Answer": "Ada"}


def lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def document(path, content):
    path.write_text(json.dumps(content))
    return path


def without(record, name):
    return {key: value for key, value in record.items() if key != name}


# ---------------------------------------------------------------- golden records


def test_twowiki(tmp_path):
    questions = twowiki.read_official(document(tmp_path / "dev.json", [TWOWIKI]))
    support, answers = ("Ada", "Olof"), ("Morn",)
    assert questions.examples == (Example("a1", TWOWIKI["question"], answers, "compositional", support),)
    assert questions.corpus.documents == (
        Document("Ada", "Ada", "Ada is a chemist. Her father is Olof."),
        Document("Olof", "Olof", "He lies in Morn."),
        Document("Sea", "Sea", ""),
    )
    assert questions.brought == {"a1": ("Ada", "Olof", "Sea")}


def test_musique_tells_paragraphs_of_one_title_apart_and_leaves_out_what_has_no_answer(tmp_path):
    second = MUSIQUE | {"id": "2hop__4_5", "answer_aliases": [], "paragraphs": MUSIQUE["paragraphs"][1:]}
    open_question = MUSIQUE | {"id": "2hop__9_9", "answerable": False}
    questions = musique.read_official(lines(tmp_path / "m.jsonl", [MUSIQUE, open_question, second]))
    assert questions.examples == (
        Example("3hop1__1_2_3", "Who?", ("Ada", "Ada L."), "3hop1", ("Paris", "Troy")),
        Example("2hop__4_5", "Who?", ("Ada",), "2hop", ("Troy",)),
    )
    assert [(d.id, d.title, d.text) for d in questions.corpus.documents] == [
        ("Paris", "Paris", "A city."),
        ("Paris (2)", "Paris", "A hero."),
        ("Troy", "Troy", "A town."),
    ]
    assert questions.brought["2hop__4_5"] == ("Paris (2)", "Troy")
    assert questions.notes == ("1 unanswerable questions are left out",)


def test_medqa_shows_the_options_and_keeps_them(tmp_path):
    questions = medqa.read_official(lines(tmp_path / "train.jsonl", [MEDQA, without(MEDQA, "meta_info")]))
    options = (("A", "Vitamin C"), ("B", "Vitamin D"))
    text, answers = "Which vitamin?\n(A) Vitamin C\n(B) Vitamin D", ("B", "Vitamin D")
    assert questions.examples[0] == Example("train-1", text, answers, "step1", options=options)
    assert questions.examples[1] == Example("train-2", text, answers, "", options=options)
    assert questions.corpus == NO_CORPUS


def test_pubmedqa_brings_its_abstract_without_the_conclusion(tmp_path):
    questions = pubmedqa.read_official(document(tmp_path / "ori_pqal.json", {"108": PUBMEDQA}))
    options = (("yes", "yes"), ("no", "no"), ("maybe", "maybe"))
    assert questions.examples == (Example("108", "Does it help?", ("maybe",), support=("108",), options=options),)
    abstract = "BACKGROUND: We asked. RESULTS: It helped 7 of 9."
    assert questions.corpus.documents == (Document("108", "PubMed 108", abstract),)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("b.json", json.dumps([BAMBOOGLE])),
        ("b.csv", '\ufeffQuestion,Answer\n"Who was, then?",Ada\n'),
    ],
)
def test_bamboogle(tmp_path, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8")
    questions = bamboogle.read_official(tmp_path / name)
    assert questions == QuestionSet((Example("bamboogle-1", "Who was, then?", ("Ada",)),), NO_CORPUS)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("reader", "content", "message"),
    [
        (twowiki, "{", "cannot read .*file; got .* Give the official 2WikiMultihopQA json"),
        (twowiki, {}, "file is no list of questions; got dict"),
        (twowiki, [without(TWOWIKI, "evidences")], "file, record 0: missing field; got evidences"),
        (twowiki, [TWOWIKI, TWOWIKI | {"evidences": "x"}], "record 1: field of the wrong type; got evidences: str"),
        (twowiki, [TWOWIKI | {"supporting_facts": [["Ada", "1"]]}], "record 0: wrong entry in supporting_facts"),
        (twowiki, [TWOWIKI | {"answer": ""}], "record 0: no gold answer"),
        (twowiki, [TWOWIKI, TWOWIKI], "file: two questions have the same id; got 'a1'"),
        (pubmedqa, [], "file is no object of questions; got list"),
        (pubmedqa, {"7": without(PUBMEDQA, "LABELS")}, "file, record 7: missing field; got LABELS"),
        (pubmedqa, {"7": PUBMEDQA | {"final_decision": "perhaps"}}, "record 7: unknown final_decision; got 'perhaps'"),
        (pubmedqa, {"7": PUBMEDQA | {"LABELS": ["A"]}}, "record 7: each context needs its label; got 2 contexts, 1"),
        (pubmedqa, {"7": PUBMEDQA | {"CONTEXTS": [1, "a"]}}, "record 7: a label or context is no text; got 1"),
        (pubmedqa, {"7": PUBMEDQA | {"QUESTION": " "}}, "record 7: no question"),
    ],
)
def test_a_bad_json_file_is_named(tmp_path, reader, content, message):
    path = tmp_path / "file"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(InputError, match=message):
        reader.read_official(path)


@pytest.mark.parametrize(
    ("reader", "records", "message"),
    [
        (musique, [], "f.jsonl holds no answerable question"),
        (musique, [MUSIQUE | {"answerable": False}], "holds no answerable question; got 1 others"),
        (musique, [MUSIQUE, without(MUSIQUE, "answer")], "f.jsonl, line 2: missing field; got answer"),
        (musique, [MUSIQUE | {"answerable": "yes"}], "line 1: field of the wrong type; got answerable: str"),
        (musique, [MUSIQUE | {"paragraphs": [{"title": "a"}]}], "line 1, paragraph: missing field; got paragraph_text"),
        (musique, [MUSIQUE | {"answer_aliases": [3]}], "line 1: an alias is no text; got 3"),
        (musique, [MUSIQUE | {"answer": " "}], "line 1: no gold answer"),
        (medqa, [], "f.jsonl holds no question"),
        (medqa, [MEDQA, without(MEDQA, "options")], "f.jsonl, line 2: missing field; got options"),
        (medqa, [MEDQA | {"options": ["a"]}], "line 1: field of the wrong type; got options: list"),
        (medqa, [MEDQA | {"options": {"A": 1, "B": "Vitamin D"}}], "line 1: an option is no text; got 1"),
        (medqa, [MEDQA | {"answer_idx": "A"}], "line 1: the answer is not that option; got 'Vitamin D', and 'A' is"),
        (medqa, [MEDQA | {"answer_idx": "E"}], "line 1: the answer is not that option; got .* 'E' is None"),
        (medqa, [MEDQA | {"question": ""}], "line 1: no question"),
        (medqa, [MEDQA | {"meta_info": 1}], "line 1: meta_info is no text"),
        (musique, [3], "f.jsonl, line 1 is no JSON object"),
    ],
)
def test_a_bad_jsonl_file_is_named(tmp_path, reader, records, message):
    with pytest.raises(InputError, match=message):
        reader.read_official(lines(tmp_path / "f.jsonl", records))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "b.csv holds no question"),
        (b"Question,Answer\n", "b.csv holds no question"),
        (b"Query,Answer\nWho?,Ada\n", "b.csv, question 1: missing field; got Question"),
        (b"Question,Answer\nWho?,Ada\nWho?\n", "question 2: field of the wrong type; got Answer: NoneType"),
        (b"Question,Answer\nWho?,\n", "question 1: no gold answer"),
        (b"Question,Answer\nWh\xff?,Ada\n", "cannot read .*b.csv"),
        (b'Question,Answer\n"Who?"x,Ada\n', "cannot read .*b.csv"),
    ],
)
def test_a_bad_csv_file_is_named(tmp_path, content, message):
    (tmp_path / "b.csv").write_bytes(content)
    with pytest.raises(InputError, match=message):
        bamboogle.read_official(tmp_path / "b.csv")


@pytest.mark.parametrize("reader", [twowiki, musique, bamboogle, medqa, pubmedqa])
def test_a_missing_file_is_named(tmp_path, reader):
    with pytest.raises(InputError, match=r"cannot read .*absent"):
        reader.read_official(tmp_path / "absent")


# ---------------------------------------------------------------- question sets


def test_items_gather_to_the_same_set():
    a, b = Document("a", "A", "x"), Document("b", "B", "y")
    items = [(Example("1", "q", ("g",), support=("a",)), (a, b)), (Example("2", "q", ("g",)), ())]
    questions = gathered(items, "here", ("note",))
    assert list(questions.items()) == items
    assert gathered(questions.items(), "here", questions.notes) == questions


def test_questions_over_another_corpus_keep_the_support_that_it_holds():
    a, b = Document("a", "A", "x"), Document("b", "B", "y")
    items = [(Example("1", "q", ("g",), support=("a", "b")), (a, b)), (Example("2", "q", ("g",)), (a,))]
    questions = gathered(items, "here")
    moved = questions.over(Corpus.from_documents([b]))
    assert [example.support for example in moved.examples] == [("b",), ()]
    assert (len(moved.corpus), moved.brought) == (1, {})
    assert moved.notes == ("1 questions have gold documents outside the corpus",)
    assert questions.over(questions.corpus).notes == ()


# ---------------------------------------------------------------- real extracts


@needs_data
@pytest.mark.parametrize(
    ("reader", "file", "questions", "paragraphs", "brought"),
    [
        (hotpotqa, "hotpotqa/hotpot_dev_distractor_subset.json", 277, 2750, None),
        (twowiki, "2wikimultihopqa/train_subset.json", 500, 3112, 10),
        (twowiki, "2wikimultihopqa/dev_subset.json", 500, 3306, 10),
        (musique, "musique/musique_ans_v1.0_train_subset.jsonl", 100, 1890, 20),
        (musique, "musique/musique_ans_v1.0_dev_subset.jsonl", 100, 1839, 20),
        (medqa, "medqa/train_subset.jsonl", 1000, 0, 0),
        (pubmedqa, "pubmedqa/ori_pqal_subset.json", 500, 500, 1),
    ],
)
def test_the_published_files_are_read(reader, file, questions, paragraphs, brought):
    found = reader.read_official(DATA / file)
    assert (len(found.examples), len(found.corpus), found.notes) == (questions, paragraphs, ())
    assert all(id in found.corpus for example in found.examples for id in example.support)
    assert all(set(e.support) <= set(found.brought[e.id]) for e in found.examples if e.support)
    if brought is not None:
        assert {len(found.brought.get(example.id, ())) for example in found.examples} == {brought}


@needs_data
def test_the_kinds_of_the_published_files():
    found = twowiki.read_official(DATA / "2wikimultihopqa" / "dev_subset.json").examples
    kinds = [example.kind for example in found]
    expected = {"compositional": 202, "bridge_comparison": 130, "comparison": 104, "inference": 64}
    assert {kind: kinds.count(kind) for kind in set(kinds)} == expected
    found = musique.read_official(DATA / "musique" / "musique_ans_v1.0_dev_subset.jsonl").examples
    kinds = [example.kind for example in found]
    expected = {"2hop": 53, "3hop1": 29, "3hop2": 5, "4hop1": 10, "4hop2": 1, "4hop3": 2}
    assert {kind: kinds.count(kind) for kind in set(kinds)} == expected
    assert {len(e.support) for e in found if e.kind == "2hop"} == {2}
