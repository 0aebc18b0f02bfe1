"""Answer metrics against golden values and a second implementation; bootstrap against scipy and theory."""

import string

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from jraggym import metrics
from jraggym.errors import InputError
from jraggym.metrics import (
    bootstrap_interval,
    cover_exact_match,
    exact_match,
    hotpot_f1,
    multiple_choice,
    normalize_answer,
    paired_bootstrap,
)

OPTIONS = {"A": "Metformin", "B": "Biguanides", "C": "Insufficient Data", "D": "A. baumannii"}


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Eiffel\tTower!", "eiffel tower"),
        ("A.B.C.", "abc"),  # punctuation goes before articles: no lone "a" is left to delete
        ("an apple a day, the end", "apple day end"),
        ("New-York's", "newyorks"),
        ("Ålesund “a”", "ålesund “ ”"),  # only ASCII punctuation is deleted
        ("the", ""),
        ("", ""),
    ],
)
def test_normalize_answer_golden(text, normal):
    assert normalize_answer(text) == normal


@pytest.mark.parametrize(
    ("prediction", "golds", "em", "f1", "cover"),
    [
        ("The Eiffel Tower", ["eiffel tower"], 1, 1, 1),
        ("in Paris, France", ["Paris"], 0, 0.5, 1),
        ("Paris Paris Paris", ["Paris"], 0, 0.5, 1),  # a multiset: a set of words would give 1.0
        ("Parish", ["Paris"], 0, 0, 0),  # whole words only
        ("New city of York", ["New York"], 0, 2 / 3, 0),  # the words must stand in a row
        ("yes", ["Yes."], 1, 1, 1),
        ("yes it is", ["yes"], 0, 0, 1),  # yes is never partly right
        ("no", ["no one"], 0, 0, 0),
        ("noanswer", ["noanswer given"], 0, 0, 0),
        ("True", ["yes"], 0, 0, 0),  # no true -> yes map
        ("a b c d", ["x", "b c d e f"], 0, 2 * 3 / 8, 0),  # the best gold counts; the article a is deleted
        (None, ["x"], 0, 0, 0),
        ("", ["x"], 0, 0, 0),
        ("", ["A"], 0, 0, 0),  # an empty normalised gold must not match an empty prediction
        ("the", ["A"], 0, 0, 0),
        ("a ", ["A"], 1, 1, 1),
        ("the", ["The"], 1, 1, 1),
        ("", ["!", " "], 0, 0, 0),
        ("!", ["!"], 1, 1, 1),
        ("a person", ["A"], 0, 0, 0),
    ],
)
def test_answer_metrics_golden(prediction, golds, em, f1, cover):
    assert exact_match(prediction, golds) == em
    assert hotpot_f1(prediction, golds) == pytest.approx(f1)
    assert cover_exact_match(prediction, golds) == cover


@pytest.mark.parametrize("metric", [exact_match, hotpot_f1, cover_exact_match])
@pytest.mark.parametrize("golds", ["Paris", [], ()])
def test_golds_that_are_no_list_of_texts_are_refused(metric, golds):
    with pytest.raises(InputError, match="gold answers"):
        metric("Paris", golds)


def second_normalize(text):
    kept = "".join(c for c in text.lower() if c not in string.punctuation)
    words, word = [], ""
    for char in kept + " ":  # an article is a run of word characters between non-word characters
        if char.isalnum() or char == "_":
            word += char
            continue
        words.append(" " if word in ("a", "an", "the") else word)
        words.append(char)
        word = ""
    return " ".join("".join(words).split())


def second_f1(prediction, gold):
    if prediction != gold and {prediction, gold} & {"yes", "no", "noanswer"}:
        return 0.0
    left, hits = gold.split(), 0
    for word in prediction.split():
        if word in left:
            left.remove(word)
            hits += 1
    if hits == 0:
        return 0.0
    precision, recall = hits / len(prediction.split()), hits / len(gold.split())
    return 2 * precision * recall / (precision + recall)


def second_cover(prediction, gold):
    words, wanted = prediction.split(), gold.split()
    return float(any(words[i : i + len(wanted)] == wanted for i in range(len(words))))


WORDS = st.sampled_from(["the", "a", "an", "Paris", "paris.", "New", "York", "yes", "no", "noanswer", "A.", "b-c", "é"])
TEXTS = st.lists(WORDS, max_size=5).map(" ".join) | st.text("aAnthe b.-_!\u00e9\t", max_size=8)


@settings(deadline=None)  # a busy machine is no failure
@given(TEXTS, st.lists(TEXTS, min_size=1, max_size=3))
def test_answer_metrics_equal_a_second_implementation(prediction, golds):
    ours = second_normalize(prediction)
    assert normalize_answer(prediction) == ours
    for metric, second in (
        (exact_match, lambda p, g: float(p == g)),
        (hotpot_f1, second_f1),
        (cover_exact_match, second_cover),
    ):
        expected = 0.0
        for gold in golds:
            theirs = second_normalize(gold)
            raw = prediction.strip().lower()
            score = second(ours, theirs) if theirs else float(raw != "" and raw == gold.strip().lower())
            expected = max(expected, score)
        assert metric(prediction, golds) == pytest.approx(expected), metric.__name__


@settings(deadline=None)  # a busy machine is no failure
@given(TEXTS, TEXTS)
def test_exact_match_implies_the_softer_metrics(prediction, gold):
    if exact_match(prediction, [gold]):
        assert hotpot_f1(prediction, [gold]) == cover_exact_match(prediction, [gold]) == 1.0


@pytest.mark.parametrize(
    ("prediction", "letter"),
    [
        ("B", "B"),
        ("(B)", "B"),
        (" b ", "B"),
        ("b)", "B"),
        ("c", "C"),
        ("B.", "B"),
        ("(B).", "B"),
        ("B. Biguanides", "B"),
        ("B) biguanides.", "B"),
        ("(B) Biguanides", "B"),
        ("B: Biguanides", "B"),
        ("answer: B", "B"),
        ("Answer: (B) Biguanides", "B"),
        ("The answer is C.", "C"),
        ("answer is: c", "C"),
        ("biguanides", "B"),
        ("Insufficient Data", "C"),  # not D, the first capital A-D of a careless reader
        ("A. baumannii", "D"),  # the text of an option, though it starts like the letter A
        ("D. A. baumannii", "D"),
        ("Biguanides, C", None),
        ("OutOfMemoryError: CUDA out of memory", None),
        ("B. Metformin", None),  # the letter of one option with the text of another
        ("B because of the lactate", None),
        ("A or B", None),
        ("AB", None),
        ("E", None),
        ("(B", None),
        ("answer: ", None),
        ("", None),
        (None, None),
    ],
)
def test_multiple_choice_reads_exactly_one_option(prediction, letter):
    scores = {gold: multiple_choice(prediction, gold, OPTIONS) for gold in OPTIONS}
    assert scores == {gold: float(gold == letter) for gold in OPTIONS}


def test_multiple_choice_texts_that_differ_only_in_punctuation_or_repeat():
    doses = {"A": "1.5 mg", "B": "15 mg", "C": "none", "D": "None"}
    assert multiple_choice("15 mg", "B", doses) == 1.0
    assert multiple_choice("1.5 mg", "A", doses) == 1.0
    assert multiple_choice("1,5 mg", "A", doses) == 0.0, "two options have this normalised text"
    assert multiple_choice("none", "C", doses) == 0.0, "two options have this text"
    assert multiple_choice("D. none", "D", doses) == 1.0, "the letter tells equal texts apart"


def test_multiple_choice_refuses_a_gold_that_is_no_option():
    with pytest.raises(InputError, match="gold letter"):
        multiple_choice("B", "E", OPTIONS)


def test_bootstrap_interval_is_seeded_and_agrees_with_scipy():
    values = np.random.default_rng(0).random(80) ** 2
    ours = bootstrap_interval(values, seed=3)
    assert ours == bootstrap_interval(values, seed=3)
    assert ours != bootstrap_interval(values, seed=4)
    theirs = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert bootstrap_interval(values, seed=3, samples=20_000) == pytest.approx(tuple(theirs), abs=0.003)
    narrow, wide = bootstrap_interval(values, seed=3, level=0.5), ours
    assert wide[0] < narrow[0] < values.mean() < narrow[1] < wide[1]


def test_bootstrap_interval_covers_the_true_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(7)
    intervals = [bootstrap_interval(rng.random(60) < 0.4, seed=i, level=0.9, samples=300) for i in range(300)]
    covered = np.mean([low <= 0.4 <= high for low, high in intervals])
    assert 0.83 <= covered <= 0.96, covered


def test_bootstrap_interval_does_not_depend_on_how_much_is_drawn_at_once(monkeypatch):
    values = np.arange(50.0)
    whole = bootstrap_interval(values, seed=0, samples=1000)
    monkeypatch.setattr(metrics, "_DRAWS_AT_ONCE", 7 * 50)
    assert bootstrap_interval(values, seed=0, samples=1000) == whole


def test_paired_bootstrap_sees_a_small_but_steady_gain():
    base = np.random.default_rng(0).random(100)
    mean, low, high = paired_bootstrap(base + 0.05, base, seed=0)
    assert (mean, low, high) == pytest.approx((0.05, 0.05, 0.05))
    unpaired = bootstrap_interval(base, seed=0)
    assert unpaired[1] - unpaired[0] > 0.05, "an unpaired comparison could not have seen it"


def test_paired_bootstrap_of_opposite_signs():
    a, b = np.random.default_rng(1).random((2, 64))
    mean, low, high = paired_bootstrap(a, b, seed=5)
    assert low <= mean <= high
    assert paired_bootstrap(b, a, seed=5) == pytest.approx((-mean, -high, -low))


@pytest.mark.parametrize("values", [[], [[1.0, 2.0]], [1.0, float("nan")], 3.0])
def test_bootstrap_refuses_what_is_no_vector_of_numbers(values):
    with pytest.raises(InputError, match="vector of finite numbers"):
        bootstrap_interval(values, seed=0)


@pytest.mark.parametrize("bad", [{"level": 1.0}, {"level": 0.0}, {"samples": 0}])
def test_bootstrap_refuses_a_bad_setting(bad):
    with pytest.raises(InputError):
        bootstrap_interval([1.0, 0.0], seed=0, **bad)


def test_paired_bootstrap_refuses_different_question_sets():
    with pytest.raises(InputError, match="same questions"):
        paired_bootstrap([1.0, 0.0], [1.0], seed=0)
