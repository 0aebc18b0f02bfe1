"""Scaling curves: what is measured is kept, the claims are judged as written down, and the points are checked."""

import re
from dataclasses import replace

import jax
import numpy as np
import pytest
from small_jobs import FEW, MODEL, one_world, small  # noqa: F401 - a fixture

import eval.scaling
import jraggym.recipes.scaling as stages
from eval.scaling import Arguments, draw, run, summary
from jraggym.data.process import ProcessRecord, Provenance
from jraggym.errors import InputError
from jraggym.model_folder import Model, save_model
from jraggym.models.decoder import init, specs
from jraggym.recipes.quickstart import train_tokenizer
from jraggym.recipes.scaling import Scale, pooled_mean
from jraggym.recipes.task import synthhop_task
from jraggym.types import Candidate, State

ACTIONS = ("<search> mayor</search>", "<answer> yes</answer>", "<answer> no</answer>")


@pytest.fixture
def arguments(tmp_path):
    """Two points a curve, by an actor of random weights."""
    plain = small(Arguments(seeds=(0,)), tmp_path / "out", scale=Scale((4, 8), (1, 2)))
    settings = replace(plain.settings, candidates=2, critic=FEW, max_turns=2)
    tokenizer = train_tokenizer(synthhop_task(0, train=40, development=6, test=6), settings)
    config = replace(MODEL, vocab=tokenizer.vocab_size)
    save_model(tmp_path / "model", Model("actor", config, tokenizer, init(specs(config), jax.random.key(0)), {}))
    return replace(plain, settings=settings, models=(tmp_path / "model",))


def made(shop, name, actor, examples, rollout):
    """So small an actor writes no good action: the states are real, their candidates are made."""
    candidates = tuple(Candidate(text, 1 / (1 + rank)) for rank, text in enumerate(ACTIONS))
    rest = ("yes",), candidates, 0, 1.0, 1.0, Provenance("a", "j", "r", 0)
    return [ProcessRecord(e.id, 0, State(e.question), "", *rest) for e in examples]


def test_points_are_measured_once_and_the_whole_is_written(arguments, monkeypatch):
    monkeypatch.setattr(stages, "collect_round", made)
    learnt = []
    train = stages.train_critic
    monkeypatch.setattr(
        stages,
        "train_critic",
        lambda shop, name, actor, part: learnt.append(len(part)) or train(shop, name, actor, part),
    )
    first = run(arguments)
    assert learnt == [4, 8]
    assert [[point["at"] for point in first[name]] for name in ("greedy", "questions", "candidates")] == [
        [0],
        [4, 8],
        [1, 2],
    ]
    assert (arguments.out / "scaling.svg").read_text().startswith("<svg")
    points = sorted(path.name for path in (arguments.out / "seed0" / "points").iterdir())
    assert points == [
        *("best of 1, 8 questions.json", "best of 2, 4 questions.json", "best of 2, 8 questions.json"),
        "greedy.json",
    ]

    def never(*rest):
        raise AssertionError("it is measured already")

    monkeypatch.setattr(stages, "Evaluator", never)
    again = run(arguments)
    assert {key: value for key, value in again.items() if key != "stages"} == {
        key: value for key, value in first.items() if key != "stages"
    }
    with pytest.raises(InputError, match="other settings"):
        run(replace(arguments, scale=Scale((4, 8), (1, 4))))


def em(*shares):
    """Scores of 100 questions for each seed."""
    return [(np.arange(100) < 100 * share).astype(float) for share in shares]


def test_claims_are_judged_by_the_gain_its_interval_and_the_way_up():
    found = summary(
        {
            "greedy": {0: em(0.4, 0.5)},
            "questions": {70: em(0.5, 0.5), 140: em(0.4, 0.6), 280: em(0.45, 0.5), 560: em(0.7, 0.7)},
            "candidates": {1: em(0.50, 0.50), 2: em(0.50, 0.51), 4: em(0.51, 0.51)},
        }
    )
    assert found["greedy"][0]["em"] == pytest.approx(0.45)
    assert found["greedy"][0]["seeds"] == pytest.approx([0.4, 0.5])
    questions, candidates = found["claims"]["questions"], found["claims"]["candidates"]
    assert questions["gain"] == pytest.approx(0.2)
    assert questions["holds"]
    assert not questions["rises"], "the third point is lower than the second"
    assert candidates["rises"]
    assert not candidates["holds"], "0.01 is less than what was asked for"


def test_the_interval_of_a_mean_is_that_of_its_standard_error():
    mean, low, high = pooled_mean(em(0.5, 0.5))
    # two seeds of 100 coins: the standard error of their mean is 0.5 / sqrt(200)
    assert mean == 0.5
    assert (mean - low, high - mean) == pytest.approx((1.96 * 0.5 / 200**0.5,) * 2, abs=0.012)


def test_the_drawing_names_the_points_of_both_curves():
    svg = draw(
        {"greedy": {0: em(0.4)}, "questions": {70: em(0.5), 140: em(0.6)}, "candidates": {1: em(0.4), 2: em(0.6)}}
    )
    told = re.findall(r"<!-- (.*?) -->", svg)
    assert {"70", "140", "1", "2", *eval.scaling.TITLES.values()} <= set(told)


@pytest.mark.parametrize("points", [(70,), (70, 70), (140, 70), (0, 70)])
def test_points_have_to_rise(points):
    for name in ("questions", "candidates"):
        with pytest.raises(InputError, match=f"{name} must be two or more rising numbers"):
            Scale(**{name: points})


def test_each_model_needs_its_seed(arguments):
    with pytest.raises(InputError, match="a seed of its own"):
        run(replace(arguments, seeds=(0, 1)))
    assert not arguments.out.exists()
