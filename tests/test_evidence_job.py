"""The job of evidence search from official files to its tables, on made-up questions and a random encoder."""

import dataclasses
import json

import pytest
from bert_sample import write_bert

from jraggym.errors import InputError
from jraggym.recipes.evidence import EvidenceSettings, in_two_ways
from jraggym.training import Optimization
from jraggym.types import Document
from train.evidence import Arguments, main
from train.results import Console

SETTINGS = EvidenceSettings(
    searches=2, documents=1, rounds=1, states=2, contrasts=3, epochs=1.0, limit=32, around=3, frozen=1,
    optimization=Optimization(1, matrix_rate=0.0, rate=1e-3, warmup=1),
)  # fmt: skip


def question(number, **changes):
    film, person = f"Sea of Port{number}", f"Mor Tarvan{number}"
    context = [
        [film, [f"{film} is a novel that was directed by {person} in the hills of Germany{number}."]],
        [person, [f"{person} was born in Port."]],
        [f"Germany{number}", [f"Germany{number} is a hill."]],
    ]
    record = {
        "_id": f"q{number}", "type": "compositional", "question": f"Where was the director of {film} born?",
        "context": context, "supporting_facts": [[film, 0], [person, 0]], "evidences": [], "answer": "Port",
    }  # fmt: skip
    return record | changes


@pytest.fixture
def arguments(tmp_path):
    files = tmp_path / "twowiki"
    files.mkdir()
    (files / "train.json").write_text(json.dumps([question(n) for n in range(6)]))
    (files / "dev.json").write_text(json.dumps([question(n) for n in range(6, 10)]))
    encoder = tmp_path / "all-MiniLM-L6-v2"
    encoder.mkdir()
    write_bert(encoder, positions=64)
    return Arguments(twowiki=files, out=tmp_path / "out", encoder=str(encoder), settings=SETTINGS)


def test_from_files_to_tables_and_again_to_the_same(arguments, capsys, monkeypatch):
    progress = Console.progress

    def killed(self, stage, done, total, metrics):
        if stage == "critic":
            raise KeyboardInterrupt
        progress(self, stage, done, total, metrics)

    monkeypatch.setattr(Console, "progress", killed)
    with pytest.raises(KeyboardInterrupt):
        main(arguments)
    choices = (arguments.out / "choices-twowiki.json").stat().st_mtime_ns
    monkeypatch.setattr(Console, "progress", progress)
    main(arguments)
    assert (arguments.out / "choices-twowiki.json").stat().st_mtime_ns == choices, "labels are made once"
    scores = (arguments.out / "scores.json").read_text()
    em = json.loads(scores)["em"]
    assert em["twowiki: oracle"] == [1.0] * 4
    assert {name.split(": ")[1] for name in em} >= {"critic", "shuffled rewards", "random critic", "first proposals"}
    said, missed = (
        capsys.readouterr().out,
        json.loads((arguments.out / "results.json").read_text())["missed"]["twowiki"],
    )
    assert "| critic |" in said
    assert f"Documents that the critic missed: {'; '.join(f'{why} {count}' for why, count in missed.items())}" in said
    assert (sum(missed.values()) == 0) == (em["twowiki: critic"] == [1.0] * 4)
    main(arguments)
    assert (arguments.out / "scores.json").read_text() == scores
    assert (arguments.out / "critic" / "model.safetensors").exists()


def test_development_scores_no_question_that_was_learnt_from(arguments):
    main(dataclasses.replace(arguments, evaluate="development", control=False))
    assert len(json.loads((arguments.out / "scores.json").read_text())["em"]["twowiki: critic"]) == 2


@pytest.mark.parametrize(
    ("dev", "what"),
    [
        ([question(0, _id="other")], "overlap"),
        ([question(7, supporting_facts=[])], "without evidence"),
    ],
)
def test_questions_that_would_count_wrongly_are_refused(arguments, dev, what):
    (arguments.twowiki / "dev.json").write_text(json.dumps(dev))
    with pytest.raises(InputError, match=what):
        main(arguments)
    assert not arguments.out.exists()


def test_no_questions_are_refused(arguments):
    with pytest.raises(InputError, match="--twowiki"):
        main(dataclasses.replace(arguments, twowiki=None))


def test_questions_without_a_choice_are_refused(arguments):
    bare = [question(0, context=[["Sea of Port0", ["A novel."]]], supporting_facts=[["Sea of Port0", 0]])]
    (arguments.twowiki / "train.json").write_text(json.dumps(bare))
    with pytest.raises(InputError, match="nothing to choose"):
        main(arguments)


def test_questions_are_searched_in_one_way_and_names_in_another():
    def marked(mark):
        return lambda queries, k: [(Document(f"{mark}{query}{k}", "", ""),) for query in queries]

    lookup = in_two_ways({"who?", "where?"}, marked("whole "), marked("name "))
    found = [hits[0].id for hits in lookup(["who?", "Ann Ann who?", "where?", "who?"], 3)]
    assert found == ["whole who?3", "name Ann Ann who?3", "whole where?3", "whole who?3"]
    assert lookup([], 3) == []
