"""The rule-based judge: the order of its criteria, rank rewards, and indifference to a candidate's position."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jraggym.labelling import grade, rank_rewards, support_judge
from jraggym.types import Answer, Document, Example, Malformed, Search, State, Turn

EXAMPLE = Example("e", "Who?", ("Marnos", "the Marnos"), "2-hop", ("A", "B"))
A, B, X, Y = (Document(name, name, "text") for name in "ABXY")

NOTHING = State("Who?")
HALF = State("Who?", (Turn(Search("first"), (A, X)),))
ALL = State("Who?", (Turn(Search("first"), (A, X)), Turn(Search("second"), (B,))))

# state -> its candidates, (action, what its search brings), from best to worst
ORDERS = {
    "nothing read": (
        NOTHING,
        [
            (Search("both"), (A, B)),
            (Search("one, on top"), (B, X)),
            (Search("one, below"), (X, A)),
            (Search("nothing needed"), (X, Y)),
            (Search("no hit"), ()),
            (Answer("Marnos"), ()),
            (Answer("wrong"), ()),
            (Malformed("empty"), ()),
        ],
    ),
    "half read": (
        HALF,
        [
            (Search("the rest, on top"), (B, A)),
            (Search("the rest, below"), (A, B)),
            (Search("only news, none needed"), (Y,)),
            (Search("first"), (A, X)),
            (Answer("Marnos"), ()),
            (Answer("A"), ()),
            (Malformed("empty"), ()),
        ],
    ),
    "all read": (
        ALL,
        [
            (Answer("Marnos"), ()),
            (Search("news, none needed"), (Y, A)),
            (Search("nothing new"), (A, B, X)),
            (Answer("wrong"), ()),
            (Malformed("empty"), ()),
        ],
    ),
}


def grades(state, candidates):
    return [grade(EXAMPLE, state, action, found) for action, found in candidates]


def judge(state, candidates):
    return support_judge(EXAMPLE, state, [action for action, _ in candidates], [found for _, found in candidates])


# ---------------------------------------------------------------- ranks


@pytest.mark.parametrize(
    ("values", "rewards"),
    [
        ([], []),
        ([(3,)], [1]),
        ([(5,), (3,), (3,), (5,)], [1, 1 / 3, 1 / 3, 1]),
        ([(1,), (2,), (3,)], [1 / 3, 1 / 2, 1]),
        ([(2,), (2,), (2,)], [1, 1, 1]),
        ([(5, 1, -1), (5, 1, 0), (5, 2, -1), (4,)], [1 / 3, 1 / 2, 1, 1 / 4]),
    ],
)
def test_rank_rewards(values, rewards):
    assert rank_rewards(values) == pytest.approx(rewards)


@settings(max_examples=100, deadline=None)
@given(values=st.lists(st.integers(0, 3).map(lambda v: (v,)), min_size=1, max_size=6))
def test_rank_rewards_keep_the_order(values):
    rewards = rank_rewards(values)
    assert max(rewards) == 1
    assert all(0 < reward <= 1 for reward in rewards)
    for (a, x), (b, y) in itertools.product(zip(values, rewards, strict=True), repeat=2):
        assert (a > b) == (x > y)
        assert (a == b) == (x == y)


# ---------------------------------------------------------------- the three criteria


@pytest.mark.parametrize("name", ORDERS)
def test_the_order_of_candidates(name):
    state, candidates = ORDERS[name]
    found = grades(state, candidates)
    for (a, (better, _)), (b, (worse, _)) in itertools.pairwise(zip(found, candidates, strict=True)):
        assert a > b, f"{name}: {better} should beat {worse}; grades {a} and {b}"
    assert judge(state, candidates) == pytest.approx([1 / (1 + rank) for rank in range(len(candidates))])


@pytest.mark.parametrize("state", [NOTHING, HALF])
def test_a_premature_answer_is_below_every_search_even_when_right(state):
    searches = [(Search("useful"), (B,)), (Search("useless"), (Y,)), (Search("first"), (A, X)), (Search("none"), ())]
    premature = grade(EXAMPLE, state, Answer("Marnos"), ())
    assert all(premature < found for found in grades(state, searches))
    assert premature > grade(EXAMPLE, state, Answer("wrong"), ())


def test_redundant_is_below_useless():
    useless, repeated, nothing_new, empty = grades(
        HALF, [(Search("x"), (Y,)), (Search("first"), (Y,)), (Search("x"), (X, A)), (Search("x"), ())]
    )
    assert useless > repeated == nothing_new == empty


def test_asking_again_is_redundant_whatever_the_thought():
    again = grade(EXAMPLE, HALF, Search("first", "another thought"), (Y,))
    assert again == grade(EXAMPLE, HALF, Search("first"), (A, X))


def test_asking_again_what_failed_is_useful():
    failed = State("Who?", (Turn(Search("first"), error="timed out"),))
    assert grade(EXAMPLE, failed, Search("first"), (A,)) == grade(EXAMPLE, NOTHING, Search("first"), (A,))


def test_any_gold_answer_counts_and_is_normalised():
    right = grade(EXAMPLE, ALL, Answer("Marnos"), ())
    assert grade(EXAMPLE, ALL, Answer("The marnos."), ()) == right
    assert grade(EXAMPLE, ALL, Answer("Marnos, I think"), ()) < right


def test_an_option_is_right_by_its_letter_with_or_without_its_text():
    example = Example("e", "Which?", ("B", "Marnos"), options=(("A", "Torvan"), ("B", "Marnos")))
    right, *others = (grade(example, NOTHING, Answer(text), ()) for text in ("B", "(B) Marnos", "marnos", "A"))
    assert others[:2] == [right, right]
    assert others[2] < right


def test_malformed_is_lowest_in_every_state():
    for state, candidates in ORDERS.values():
        lowest = grade(EXAMPLE, state, Malformed("anything"), ())
        assert all(lowest < found for found in grades(state, candidates[:-1]))


def test_every_malformed_one_is_as_bad():
    assert grade(EXAMPLE, ALL, Malformed("a"), ()) == grade(EXAMPLE, NOTHING, Malformed("b"), ())


def test_a_question_without_support_wants_the_answer_at_once():
    example = Example("e", "Who?", ("Marnos",))
    best = grade(example, NOTHING, Answer("Marnos"), ())
    assert best > grade(example, NOTHING, Search("q"), (A,)) > grade(example, NOTHING, Answer("wrong"), ())


def test_who_found_the_support_is_no_matter():
    swapped = State("Who?", (Turn(Search("x"), (B,)), Turn(Search("y"), (X, A))))
    assert grade(EXAMPLE, swapped, Answer("Marnos"), ()) == grade(EXAMPLE, ALL, Answer("Marnos"), ())


# ---------------------------------------------------------------- position

actions = st.one_of(
    st.builds(Search, st.sampled_from(["first", "second", "third"])),
    st.builds(Answer, st.sampled_from(["Marnos", "wrong"])),
    st.just(Malformed("empty")),
)
hits = st.lists(st.sampled_from([A, B, X, Y]), max_size=2, unique=True).map(tuple)
candidate = actions.flatmap(lambda a: hits.map(lambda h: (a, h if isinstance(a, Search) else ())))


@settings(max_examples=150, deadline=None)
@given(
    state=st.sampled_from([NOTHING, HALF, ALL]),
    candidates=st.lists(candidate, min_size=1, max_size=6),
    shuffle=st.randoms(use_true_random=False),
)
def test_a_reward_follows_its_candidate_and_never_the_position(state, candidates, shuffle):
    order = list(range(len(candidates)))
    shuffle.shuffle(order)
    rewards = judge(state, candidates)
    assert judge(state, [candidates[i] for i in order]) == [rewards[i] for i in order]


def test_every_candidate_needs_its_documents():
    with pytest.raises(ValueError, match="zip"):
        support_judge(EXAMPLE, NOTHING, [Search("a"), Search("b")], [()])


def test_of_two_searches_that_bring_the_same_the_more_precise_is_better():
    actions = [Search("alpha founder"), Search("alpha"), Search("alpha mayor"), Search("alpha founder", "a thought")]
    found = [(A,)] * 4
    assert support_judge(EXAMPLE, NOTHING, actions, found) == [1.0] * 4, "nothing is known of what to ask"
    assert support_judge(EXAMPLE, NOTHING, actions, found, ["beta spouse", "alpha founder"]) == [1, 1 / 3, 1 / 4, 1]
    # what a search brings counts before how it asks
    assert support_judge(EXAMPLE, NOTHING, actions[:2], [(X,), (A,)], ["alpha founder"]) == [1 / 2, 1]
