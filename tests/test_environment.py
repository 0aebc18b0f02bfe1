"""The pure transition: its table, its budget, and properties over any sequence of actions."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jraggym.environment import correct, outcome, transition, wants_retrieval
from jraggym.errors import InputError
from jraggym.types import Answer, Document, Example, Malformed, Search, State, to_json

DOCUMENTS = (Document("d1", "Tarvan", "The mayor is Torvan Quilmer."), Document("d2", "Bexlis", "A city."))
EXAMPLE = Example("e1", "Who is the mayor of Tarvan?", ("Torvan Quilmer",))
ACTIONS = st.builds(Search, st.text()) | st.builds(Malformed, st.text()) | st.builds(Answer, st.text())
UNFINISHED = st.builds(Search, st.text()) | st.builds(Malformed, st.text())


def test_each_action_has_its_own_transition():
    start = State("q")
    answered = transition(start, Answer("a"), max_turns=5)
    assert answered == State("q", answer="a")
    assert answered.done
    searched = transition(start, Search("s"), DOCUMENTS, max_turns=5)
    assert searched.turns[0].action == Search("s")
    assert searched.turns[0].documents == DOCUMENTS
    assert not searched.done
    failed = transition(start, Search("s"), error="timeout", max_turns=5)
    assert failed.failed
    assert failed.turns[0].documents == ()
    malformed = transition(start, Malformed("m"), max_turns=5)
    assert malformed.turns[0].action == Malformed("m")
    assert malformed.turns[0].documents == ()


def test_the_budget_is_five_calls_and_four_searches():
    state, searches = State("q"), 0
    for call in range(5):
        assert not state.done, f"ended before call {call + 1}"
        searches += wants_retrieval(state, Search("s"), 5)
        assert not wants_retrieval(state, Answer("a"), 5)
        assert not wants_retrieval(state, Malformed("m"), 5)
        state = transition(state, Search("s"), max_turns=5)
    assert searches == 4
    assert state.truncated
    assert state.answer is None


def test_an_answer_on_the_last_turn_is_no_truncation():
    state = transition(State("q"), Search("s"), max_turns=2)
    state = transition(state, Answer("a"), max_turns=2)
    assert state.answer == "a"
    assert not state.truncated


def test_when_the_budget_ends_the_latest_answer_so_far_is_the_answer():
    state = State("q")
    for action in (Search("s", "t", "old"), Search("s", "u", "new"), Search("s", "v"), Malformed("m")):
        assert state.answer is None
        state = transition(state, action, max_turns=4)
    assert (state.answer, state.thought, state.truncated) == ("new", "u", True)
    assert transition(State("q"), Search("s", "t", "now"), max_turns=1).answer == "now"


def test_a_digest_stays_with_its_turn():
    [turn] = transition(State("q"), Search("s"), DOCUMENTS, digest="in short", max_turns=2).turns
    assert (turn.documents, turn.digest) == (DOCUMENTS, "in short")


def test_one_turn_allows_no_search():
    assert not wants_retrieval(State("q"), Search("s"), 1)
    assert transition(State("q"), Search("s"), max_turns=1).truncated


@pytest.mark.parametrize("done", [State("q", answer=""), State("q", truncated=True)])
def test_no_transition_from_a_finished_state(done):
    with pytest.raises(ValueError, match="over"):
        transition(done, Answer("a"), max_turns=5)
    with pytest.raises(ValueError, match="over"):
        wants_retrieval(done, Search("s"), 5)


def test_bad_input_is_refused():
    with pytest.raises(InputError, match="max_turns"):
        transition(State("q"), Answer("a"), max_turns=0)
    for action in (Answer("a"), Malformed("m")):
        with pytest.raises(InputError, match="only a search"):
            transition(State("q"), action, DOCUMENTS, max_turns=5)
        with pytest.raises(InputError, match="only a search"):
            transition(State("q"), action, error="timeout", max_turns=5)


@settings(deadline=None)  # a busy machine is no failure
@given(st.lists(UNFINISHED, min_size=9, max_size=9), st.integers(1, 9))
def test_every_sequence_of_actions_ends_in_time_with_all_turns_kept(actions, max_turns):
    state, seen = State("q"), [State("q")]
    for action in actions:
        before = to_json(state)
        following = transition(state, action, max_turns=max_turns)
        assert to_json(state) == before, "the state was mutated"
        assert transition(state, action, max_turns=max_turns) == following, "not deterministic"
        assert following.turns[:-1] == state.turns
        seen.append(state := following)
        if state.done:
            break
    assert state.truncated
    assert [turn.action for turn in state.turns] == actions[:max_turns]


@settings(deadline=None)  # a busy machine is no failure
@given(st.lists(ACTIONS, min_size=6, max_size=6), st.integers(1, 6))
def test_an_answer_ends_the_episode_wherever_it_comes(actions, max_turns):
    state = State("q")
    for step, action in enumerate(actions, start=1):
        state = transition(state, action, max_turns=max_turns)
        assert state.done == (isinstance(action, Answer) or step == max_turns)
        if state.done:
            assert state.answer == (action.text if isinstance(action, Answer) else None)
            return
    pytest.fail("the episode outlived its budget")


def test_outcome_scores_answers_and_gives_zero_to_the_unfinished():
    zeros = {"em": 0.0, "f1": 0.0, "cover_em": 0.0}
    assert outcome(State("q"), EXAMPLE) == zeros
    assert outcome(State("q", truncated=True), EXAMPLE) == zeros
    assert outcome(State("q", answer="the Torvan Quilmer."), EXAMPLE) == {"em": 1.0, "f1": 1.0, "cover_em": 1.0}
    partly = outcome(State("q", answer="It is Torvan Quilmer"), EXAMPLE)
    assert partly == {"em": 0.0, "f1": pytest.approx(2 / 3), "cover_em": 1.0}


@pytest.mark.parametrize(
    ("answer", "right"),
    [("B", 1.0), ("(B) Vitamin D", 1.0), ("vitamin D.", 1.0), ("A", 0.0), ("B or A", 0.0), ("", 0.0), (None, 0.0)],
)
def test_a_question_with_options_is_right_or_wrong(answer, right):
    example = Example("e", "Which?", ("B", "Vitamin D"), options=(("A", "Vitamin B"), ("B", "Vitamin D")))
    scores = outcome(State("q", answer=answer), example)
    assert scores == {"em": right, "f1": right, "cover_em": right, "accuracy": right}
    assert correct(answer, example) == right
