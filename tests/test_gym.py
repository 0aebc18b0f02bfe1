"""The environment with Gymnasium's face: episodes, rewards, failing retrievers, and `jraggym.make`."""

import dataclasses
import subprocess
import sys
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jraggym
from jraggym.errors import InputError
from jraggym.gym import Environment, make
from jraggym.types import Answer, Document, Example, Malformed, Search, State

DOCUMENTS = (Document("d1", "Tarvan", "The mayor is Torvan Quilmer."), Document("d2", "Bexlis", "A city."))
GOLD = "unguessable gold"
EXAMPLE = Example("e1", "Who is the mayor of Tarvan?", ("Torvan Quilmer", GOLD), support=("d1",))
ACTIONS = st.builds(Search, st.text()) | st.builds(Malformed, st.text()) | st.builds(Answer, st.text())


class Retriever:
    """Remembers what it was asked."""

    def __init__(self):
        self.queries = []

    def __call__(self, queries):
        self.queries += queries
        return [DOCUMENTS for _ in queries]


def test_an_episode_from_reset_to_reward():
    retriever = Retriever()
    environment = Environment(retriever)
    state, info = environment.reset(EXAMPLE)
    assert state == State(EXAMPLE.question)
    assert info == {"action": None, "documents": (), "error": None, "searches": 0, "malformed": 0}
    state, reward, terminated, truncated, info = environment.step("<search>mayor of Tarvan</search>")
    assert (reward, terminated, truncated) == (0.0, False, False)
    assert state.turns[0].documents == info["documents"] == DOCUMENTS
    assert info["action"] == Search("mayor of Tarvan")
    assert retriever.queries == ["mayor of Tarvan"]
    state, reward, terminated, truncated, info = environment.step('{"query": "x"}')
    assert isinstance(info["action"], Malformed)
    assert (reward, terminated, truncated) == (0.0, False, False)
    state, reward, terminated, truncated, info = environment.step(Answer("Torvan Quilmer"))
    assert (reward, terminated, truncated) == (1.0, True, False)
    assert state.answer == "Torvan Quilmer"
    assert (info["searches"], info["malformed"], info["em"], info["f1"]) == (1, 1, 1.0, 1.0)


def reachable(value):
    """Every string that can be reached through the fields of a record."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from reachable(item)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from reachable(getattr(value, field.name))
    else:
        assert value is None or isinstance(value, bool), f"a state holds a {type(value).__name__}"


@settings(deadline=None)  # a busy machine is no failure
@given(st.lists(ACTIONS.filter(lambda action: GOLD not in str(action)), max_size=6))
def test_the_gold_answer_is_reachable_from_no_state(actions):
    environment = Environment(Retriever(), max_turns=5)
    state, info = environment.reset(EXAMPLE)
    for action in actions:
        assert not any(GOLD in text for text in reachable(state))
        assert GOLD not in str(info)
        if state.done:
            break
        state, _, _, _, info = environment.step(action)


def test_without_gold_there_is_no_reward():
    environment = Environment(Retriever())
    environment.reset("Who is the mayor of Tarvan?")
    _, reward, terminated, _, info = environment.step("<answer>Torvan Quilmer</answer>")
    assert (reward, terminated) == (0.0, True)
    assert "em" not in info


def test_a_partly_right_answer_earns_nothing_but_its_f1_is_shown():
    environment = Environment(Retriever())
    environment.reset(EXAMPLE)
    _, reward, _, _, info = environment.step(Answer("It is Torvan Quilmer"))
    assert (reward, info["em"]) == (0.0, 0.0)
    assert info["f1"] == pytest.approx(2 / 3)


def test_gold_of_an_earlier_episode_is_forgotten():
    environment = Environment(Retriever())
    environment.reset(EXAMPLE)
    environment.reset("another question")
    assert environment.step(Answer("Torvan Quilmer"))[1] == 0.0


def test_the_last_search_is_not_executed_and_truncates():
    retriever = Retriever()
    environment = Environment(retriever, max_turns=3)
    environment.reset(EXAMPLE)
    ends = [environment.step(Search(f"s{i}"))[1:4] for i in range(3)]
    assert ends == [(0.0, False, False), (0.0, False, False), (0.0, False, True)]
    assert retriever.queries == ["s0", "s1"]


def test_truncation_scores_zero_and_counts_executed_searches():
    environment = Environment(Retriever(), max_turns=2)
    environment.reset(EXAMPLE)
    environment.step(Search("s"))
    _, reward, terminated, truncated, info = environment.step(Search("s"))
    assert (reward, terminated, truncated) == (0.0, False, True)
    assert (info["searches"], info["em"], info["f1"]) == (1, 0.0, 0.0)


def test_step_out_of_turn_raises():
    environment = Environment(Retriever())
    with pytest.raises(RuntimeError, match="before reset"):
        environment.step(Answer("a"))
    environment.reset("q")
    environment.step(Answer("a"))
    with pytest.raises(RuntimeError, match="after the end"):
        environment.step(Answer("a"))
    state, _ = environment.reset("q")
    assert not state.done


def failing(queries):
    raise ConnectionError("index is gone")


def exiting(queries):
    raise SystemExit(3)


@pytest.mark.parametrize(
    ("retriever", "error"),
    [
        (failing, "ConnectionError: index is gone"),
        (exiting, "SystemExit: 3"),
        (lambda queries: None, "TypeError"),
        (lambda queries: [], "ValueError"),
        (lambda queries: [["a text"]], "TypeError: the retriever returned something else than documents"),
    ],
)
def test_a_failing_retriever_gives_a_turn_with_an_error(retriever, error):
    environment = Environment(retriever)
    environment.reset(EXAMPLE)
    state, reward, terminated, truncated, info = environment.step(Search("s"))
    assert (reward, terminated, truncated) == (0.0, False, False)
    assert state.failed
    assert state.turns[0].documents == info["documents"] == ()
    assert error in info["error"]
    assert info["searches"] == 1, "a failed search was paid for"
    assert environment.step(Answer("Torvan Quilmer"))[1] == 1.0, "the episode goes on"


def test_a_hanging_retriever_is_left_behind():
    release = threading.Event()

    def hanging(queries):
        release.wait(30)
        return [DOCUMENTS]

    environment = Environment(hanging, timeout=0.05)
    environment.reset(EXAMPLE)
    start = time.monotonic()
    state, *_, info = environment.step(Search("s"))
    assert time.monotonic() - start < 5
    assert info["error"] == "no answer within 0.05 seconds"
    release.set()  # an answer that comes late changes nothing
    time.sleep(0.05)
    assert state.turns[0].documents == ()
    environment.step(Answer("a"))


def test_a_hanging_retriever_does_not_keep_the_program_alive():
    code = (
        "import time; from jraggym.gym import Environment; from jraggym.types import Search\n"
        "environment = Environment(lambda queries: time.sleep(60), timeout=0.05)\n"
        "environment.reset('q'); assert environment.step(Search('s'))[0].failed\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)


def test_reset_draws_examples_by_seed():
    examples = [Example(str(i), f"question {i}", ("a",)) for i in range(100)]
    environment = Environment(Retriever(), examples)
    first = [environment.reset(seed=5)[0], environment.reset()[0]]
    assert first[0] != first[1]
    assert first == [environment.reset(seed=5)[0], environment.reset()[0]]
    assert environment.step(Answer("a"))[1] == 1.0, "a drawn example brings its gold answer"


def test_bad_calls_are_refused():
    with pytest.raises(InputError, match="no examples"):
        Environment(Retriever()).reset()
    with pytest.raises(InputError, match="blank"):
        Environment(Retriever()).reset(" ")
    environment = Environment(Retriever())
    environment.reset("q")
    with pytest.raises(InputError, match="unknown action"):
        environment.step(3)
    for bad in ({"max_turns": 0}, {"timeout": 0}):
        with pytest.raises(InputError):
            Environment(Retriever(), **bad)


# ---------------------------------------------------------------- make


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("dataset", "synthhop"),
        ("split", "train, development, test"),  # known to the world itself
        ("retriever", "hybrid, bm25, dense"),
        ("encoder", "tfidf, minilm"),
    ],
)
def test_make_names_what_it_knows(name, known):
    with pytest.raises(InputError, match=f"unknown .*{name}; got 'nonsense'.*{known}"):
        make(**{name: "nonsense"})


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text(
        '{"id": "d1", "title": "Tarvan", "text": "A city governed by the mayor Torvan Quilmer."}\n'
        '{"id": "d2", "title": "Bexlis", "text": "A book about clouds."}\n'
        '{"id": "d3", "title": "Pludor", "text": "A company that builds ships."}\n'
    )
    return path


@pytest.mark.parametrize("retriever", ["hybrid", "bm25", "dense"])
def test_make_over_a_corpus_of_your_own(corpus, retriever):
    environment = jraggym.make(corpus, retriever=retriever, documents=1)
    assert environment.examples == ()
    environment.reset("Who is the mayor of Tarvan?")
    *_, info = environment.step("<search>mayor of Tarvan</search>")
    assert info["error"] is None
    assert [document.id for document in info["documents"]] == ["d1"]


def test_make_with_the_real_sentence_encoder(corpus):
    try:
        environment = make(corpus, retriever="dense", encoder="minilm", documents=1)
    except InputError as error:
        pytest.skip(f"no MiniLM weights: {error}")
    environment.reset("Who is the mayor of Tarvan?")
    *_, info = environment.step("<search>who runs the town</search>")
    assert [document.id for document in info["documents"]] == ["d1"], "no word in common: only meaning finds it"


def test_make_over_the_generated_world():
    environment = jraggym.make("synthhop", split="development", retriever="bm25")
    state, _ = environment.reset(seed=0)
    assert state.question in {example.question for example in environment.examples}
    state, *_, info = environment.step(Search(state.question))
    assert info["error"] is None
    assert len(info["documents"]) == 2


def test_import_jraggym_is_light():
    code = "import sys, jraggym; sys.exit(', '.join({'jax', 'transformers', 'sklearn'} & set(sys.modules)) or None)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_an_unknown_name_of_the_package_is_an_attribute_error():
    with pytest.raises(AttributeError, match="nonsense"):
        _ = jraggym.nonsense
