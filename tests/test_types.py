"""The records: JSON there and back, errors that name the field, and no way from a state to the gold answer."""

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jraggym import types
from jraggym.errors import InputError
from jraggym.types import Answer, Candidate, Document, Example, Malformed, Search, State, Step, Trajectory, Turn

FLOATS = st.none() | st.floats(allow_nan=False)
DOCUMENTS = st.builds(Document, st.text(), st.text(), st.text())
TURNS = st.builds(
    Turn,
    st.builds(Search, st.text()) | st.builds(Malformed, st.text()),
    st.lists(DOCUMENTS, max_size=2).map(tuple),
    st.none() | st.text(),
)
STATES = st.builds(State, st.text(), st.lists(TURNS, max_size=3).map(tuple), st.none() | st.text(), st.booleans())
TUPLES = st.lists(st.text(), max_size=2).map(tuple)
EXAMPLES = st.builds(
    Example, st.text(), st.text().filter(str.strip), st.lists(st.text(), min_size=1).map(tuple), st.text(), TUPLES
) | st.builds(
    Example,
    st.text(),
    st.just("Which?"),
    st.sampled_from([("A",), ("B", "second")]),
    options=st.tuples(st.tuples(st.just("A"), st.text()), st.tuples(st.just("B"), st.text())),
)
CANDIDATES = st.builds(Candidate, st.text(), FLOATS, FLOATS, FLOATS, TUPLES)
STEPS = st.builds(Step, STATES, st.lists(CANDIDATES, max_size=3).map(tuple), st.integers())
TRAJECTORIES = st.builds(Trajectory, st.text(), st.lists(STEPS, max_size=2).map(tuple), STATES)
READERS = {
    Document: types.document_from_json,
    Search: types.action_from_json,
    Answer: types.action_from_json,
    Malformed: types.action_from_json,
    Turn: types.turn_from_json,
    State: types.state_from_json,
    Example: types.example_from_json,
    Candidate: types.candidate_from_json,
    Step: types.step_from_json,
    Trajectory: types.trajectory_from_json,
}


@settings(deadline=None)  # a busy machine is no failure
@given(st.one_of(DOCUMENTS, st.builds(Answer, st.text()), TURNS, EXAMPLES, CANDIDATES, STEPS, TRAJECTORIES))
def test_json_round_trip_gives_an_equal_record_of_equal_types(record):
    read = READERS[type(record)](json.loads(json.dumps(types.to_json(record))))
    assert read == record
    assert hash(read) == hash(record), "a list in place of a tuple would not hash"


SAMPLES = [
    Document("d", "title", "text"),
    Search("q"),
    Answer("a"),
    Malformed("m"),
    Turn(Search("q"), (Document("d", "title", "text"),), "error"),
    State("q", (Turn(Search("q")),), "a", True),
    Example("e", "q", ("a",), "kind", ("d",), (("a", "first"), ("b", "second"))),
    Candidate("text", 1.0, 0.5, -0.5, ("d",), (3, 4), (-0.25, -0.25)),
    Step(State("q"), (Candidate("text"),), 0),
    Trajectory("e", (Step(State("q"), (Candidate("text"),), 0),), State("q", answer="a")),
]


def name_of(record):
    return type(record).__name__


@pytest.mark.parametrize("record", SAMPLES, ids=name_of)
def test_an_unknown_field_is_named(record):
    with pytest.raises(InputError, match=rf"unknown field in {name_of(record)}; got zeal\b"):
        READERS[type(record)](types.to_json(record) | {"zeal": 1})


@pytest.mark.parametrize("record", SAMPLES, ids=name_of)
def test_a_missing_field_is_named_and_an_optional_one_may_be_missing(record):
    for field in dataclasses.fields(record):
        value = types.to_json(record)
        del value[field.name]
        if field.default is dataclasses.MISSING:
            with pytest.raises(InputError, match=rf"missing field in {name_of(record)}; got {field.name}\b"):
                READERS[type(record)](value)
        else:
            assert getattr(READERS[type(record)](value), field.name) == field.default


@pytest.mark.parametrize("record", SAMPLES, ids=name_of)
def test_a_field_of_the_wrong_type_is_named(record):
    for field in dataclasses.fields(record):
        for wrong in ({"a": 1}, 17j):
            with pytest.raises(InputError, match=rf"\.{field.name} must be|a \w+ must be|field in|action type"):
                READERS[type(record)](types.to_json(record) | {field.name: wrong})


@pytest.mark.parametrize(
    ("read", "value", "field"),
    [
        (types.example_from_json, {"id": "e", "question": "q", "answers": "Paris"}, "answers"),
        (types.example_from_json, {"id": "e", "question": "q", "answers": ["a", 1]}, "answers"),
        (types.example_from_json, {"id": 7, "question": "q", "answers": ["a"]}, "id"),
        (types.example_from_json, {"id": "e", "question": "q", "answers": ["A"], "options": ["Ab"]}, "option"),
        (types.example_from_json, {"id": "e", "question": "q", "answers": ["A"], "options": [["A"]]}, "option"),
        (types.example_from_json, {"id": "e", "question": "q", "answers": ["A"], "options": [["A", 1]]}, "option"),
        (types.state_from_json, {"question": "q", "turns": None}, "turns"),
        (types.state_from_json, {"question": "q", "truncated": "no"}, "truncated"),
        (types.candidate_from_json, {"text": "t", "reward": "1"}, "reward"),
        (types.candidate_from_json, {"text": "t", "reward": True}, "reward"),
        (types.candidate_from_json, {"text": "t", "documents": "d12"}, "documents"),
    ],
)
def test_wrong_types_that_would_pass_silently(read, value, field):
    """A text in place of a list would otherwise become a tuple of letters, each of them a gold answer."""
    with pytest.raises(InputError, match=rf"\b{field}\b"):
        read(value)


def test_an_integer_is_a_number():
    assert types.candidate_from_json({"text": "t", "reward": 1}).reward == 1.0


@pytest.mark.parametrize("kind", ["finish", None, ["search"], 3])
def test_an_unknown_action_type_is_refused(kind):
    with pytest.raises(InputError, match="unknown action type"):
        types.action_from_json({"type": kind, "query": "q"})


def test_an_answer_is_no_turn():
    with pytest.raises(InputError, match="no turn"):
        types.turn_from_json({"action": types.to_json(Answer("a"))})


@pytest.mark.parametrize("read", set(READERS.values()), ids=lambda read: read.__name__)
@pytest.mark.parametrize("value", [None, [], "text", 3])
def test_what_is_no_object_is_refused(read, value):
    with pytest.raises(InputError):
        read(value)


@pytest.mark.parametrize("record", SAMPLES, ids=name_of)
def test_records_are_frozen(record):
    field = dataclasses.fields(record)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(record, field, None)


def test_an_example_needs_a_question_and_an_answer():
    with pytest.raises(InputError, match="'e' has no question"):
        Example("e", " ", ("a",))
    with pytest.raises(InputError, match="'e' has no gold answer"):
        Example("e", "q", ())


@pytest.mark.parametrize(("answer", "letters"), [("C", "AB"), ("first", "AB"), ("A", "AA")])
def test_the_first_answer_of_a_multiple_choice_is_the_letter_of_one_option(answer, letters):
    with pytest.raises(InputError, match=f"'e' must be the letter of one of its options; got '{answer}' and options A"):
        Example("e", "q", (answer,), options=tuple((letter, "text") for letter in letters))


def test_state_says_when_it_is_done_and_when_a_search_failed():
    assert not State("q").done
    assert State("q", answer="").done, "an empty answer is an answer"
    assert State("q", truncated=True).done
    assert not State("q", (Turn(Search("x")),)).failed
    assert State("q", (Turn(Search("x"), error="timeout"), Turn(Search("y")))).failed
