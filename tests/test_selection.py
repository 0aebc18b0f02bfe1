"""Which candidate is executed: golden choices, ties, unknown numbers and determinism."""

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jraggym.selection import SELECTORS, at_random, by_majority, by_reward, by_score, first
from jraggym.types import Candidate


def candidates(**columns):
    """Candidates from columns of equal length, such as score=[1, None]; texts differ unless given."""
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return [Candidate(**({"text": f"text {i}"} | row)) for i, row in enumerate(rows)]


def choose(selector, found, seed=0):
    return selector(found, random.Random(seed))


def test_names():
    assert {
        "first": first,
        "random": at_random,
        "score": by_score,
        "majority": by_majority,
        "reward": by_reward,
    } == SELECTORS


def test_first_takes_the_first():
    assert choose(first, candidates(score=[0, 9], reward=[0, 1])) == 0


def test_random_takes_each_equally_often():
    found, rng = candidates(score=[9, 0, 0, 0]), random.Random(0)
    counts = Counter(at_random(found, rng) for _ in range(4000))
    assert set(counts) == {0, 1, 2, 3}
    assert all(900 < count < 1100 for count in counts.values()), "a random critic has no favourite"


@pytest.mark.parametrize(
    ("score", "chosen"),
    [
        ([0.1, 0.9, 0.5], 1),
        ([-3.0, -1.0, -2.0], 1),
        ([0.5, 0.9, 0.9], 1),
        ([None, -1e9, None], 1),
        ([None, None], 0),
        ([0.0, None], 0),
        ([None, float("-inf")], 0),
        ([2.0], 0),
    ],
)
def test_by_score(score, chosen):
    assert choose(by_score, candidates(score=score)) == chosen


@pytest.mark.parametrize(
    ("text", "logprob", "chosen"),
    [
        (["a", "b", "b"], [0.0, -9.0, -9.5], 1),
        (["a", "b", "b"], [0.0, -9.5, -9.0], 2),  # of equal texts the likelier
        (["a", "b", "a", "b"], [-2.0, -1.0, -2.0, -3.0], 1),  # of equally frequent texts the likelier
        (["a", "b", "c"], [-3.0, -1.0, -2.0], 1),
        (["a", "b"], [None, -50.0], 1),
        (["a", "b"], [None, None], 0),
        (["a", "b", "b"], [-1.0, None, None], 1),
        (["a", "b"], [-1.0, -1.0], 0),
    ],
)
def test_by_majority(text, logprob, chosen):
    assert choose(by_majority, candidates(text=text, logprob=logprob)) == chosen


@pytest.mark.parametrize(
    ("reward", "chosen"), [([0.5, 1.0, 1 / 3], 1), ([None, 0.1, None], 1), ([0.0, None], 0), ([None, -5.0], 1)]
)
def test_by_reward(reward, chosen):
    assert {choose(by_reward, candidates(reward=reward), seed) for seed in range(20)} == {chosen}


def test_by_reward_breaks_ties_at_random():
    found, rng = candidates(reward=[1.0, 0.5, 1.0, None, 1.0]), random.Random(0)
    counts = Counter(by_reward(found, rng) for _ in range(3000))
    assert set(counts) == {0, 2, 4}
    assert all(900 < count < 1100 for count in counts.values()), "ties favour a position"


def test_by_reward_without_any_label_takes_any():
    assert {choose(by_reward, candidates(reward=[None, None]), seed) for seed in range(20)} == {0, 1}


numbers = st.one_of(st.none(), st.sampled_from([0.0, 0.5, 1.0]))
groups = st.lists(
    st.builds(Candidate, text=st.sampled_from("ab"), reward=numbers, score=numbers, logprob=numbers),
    min_size=1,
    max_size=6,
)


@pytest.mark.parametrize("name", SELECTORS)
@settings(max_examples=50, deadline=None)
@given(found=groups, seed=st.integers(0, 2**32))
def test_a_choice_depends_on_the_candidates_and_the_generator_alone(name, found, seed):
    chosen = choose(SELECTORS[name], found, seed)
    assert chosen in range(len(found))
    assert choose(SELECTORS[name], tuple(found), seed) == chosen


@pytest.mark.parametrize(("name", "field"), [("score", "score"), ("reward", "reward")])
@settings(max_examples=80, deadline=None)
@given(found=groups, seed=st.integers(0, 1000))
def test_the_best_known_number_wins(name, field, found, seed):
    known = [value for candidate in found if (value := getattr(candidate, field)) is not None]
    chosen = getattr(found[choose(SELECTORS[name], found, seed)], field)
    assert chosen == (max(known) if known else None)


@pytest.mark.parametrize("name", ["random", "score", "majority", "reward"])
def test_no_candidates_are_refused(name):
    with pytest.raises((ValueError, IndexError)):
        choose(SELECTORS[name], [])
