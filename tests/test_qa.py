"""Evaluations of agents: what a kill leaves is gone on with, all questions count, and what cannot be is refused."""

import dataclasses
import json
import zlib

import jax
import pytest
from agent_world import Scripted
from chat_families import write_family
from misbehaving_server import serving

import eval.qa
from configs import qa_transfer
from eval.qa import evaluate
from jraggym.agent_episodes import AgentRules
from jraggym.agents.episode import Costs, Episode
from jraggym.agents.output import ANSWER, QUERY, REASONING, format_output
from jraggym.chat_model import Reply
from jraggym.chats.connection import Server
from jraggym.chats.local import Local
from jraggym.episode_log import EpisodeLog
from jraggym.errors import InputError
from jraggym.evaluation import answer_scores
from jraggym.model_folder import Model, save_model
from jraggym.models.critic import critic_specs
from jraggym.models.decoder import DecoderConfig, init
from jraggym.recipes.qa import Qa, even_batches, open_questions
from jraggym.text.huggingface import HuggingFaceTokenizer
from jraggym.types import Candidate, Document, Example, Search, State, Step, Trajectory, Turn

RULES = AgentRules(max_turns=3, candidates=2, temperature=1.0, select="random", slots=8)
NUMBER = 40
SO = {REASONING: "So."}


@pytest.fixture
def qa(tmp_path):
    return Qa(Local("no folder"), tmp_path / "run", "react", rules=RULES, limit=NUMBER, documents=2)


def by_chance(request):
    """Searches, answers, babbles or fails, by the text of the request alone."""
    draw = zlib.crc32(f"{request.messages} {request.seed}".encode())
    said = [format_output({ANSWER: "yes"}, SO), format_output({QUERY: f"father of {draw % 7}"}, SO), "\ud800 hm"]
    return Reply(error="503") if draw % 11 == 0 else [said[draw % 3], said[draw // 3 % 3]]


class Killed(BaseException):
    pass


def dying(after):
    """The same model, which is killed in its call of that number."""
    model = Scripted(by_chance)

    def call(requests):
        if len(model.batches) == after:
            raise Killed
        return model(requests)

    return call


def play(monkeypatch, qa, model):
    monkeypatch.setattr(eval.qa, "open_models", lambda qa: (model, None, None))
    return evaluate(qa)


def test_a_killed_evaluation_ends_as_an_uninterrupted_one(qa, monkeypatch, tmp_path):
    whole = play(monkeypatch, qa, Scripted(by_chance))
    assert 0 < whole["metrics"]["em"]["mean"] < 1
    assert min(whole["costs"]["searches"], whole["faults"]["malformed"], whole["faults"]["model_errors"]) > 0
    cut = dataclasses.replace(qa, out=tmp_path / "cut")
    with pytest.raises(Killed):
        play(monkeypatch, cut, dying(after=3))
    log = cut.out / "episodes.jsonl"
    ended = {json.loads(line)["example"]["question"] for line in log.read_text().splitlines()}
    assert 0 < len(ended) < NUMBER
    log.write_text(log.read_text() + '{"example": {"id": "to')
    rest = Scripted(by_chance)
    assert play(monkeypatch, cut, rest) == whole
    asked = {message.content for request in rest.requests for message in request.messages}
    assert not [question for question in ended if any(question in content for content in asked)]
    assert (cut.out / "results.json").read_bytes() == (qa.out / "results.json").read_bytes()
    assert sorted(log.read_text().splitlines()) == sorted((qa.out / "episodes.jsonl").read_text().splitlines())


def test_a_finished_evaluation_asks_for_nothing(qa, monkeypatch):
    first, silent = play(monkeypatch, qa, Scripted(by_chance)), Scripted(by_chance)
    assert play(monkeypatch, qa, silent) == first
    assert silent.batches == []


def test_other_settings_are_refused_but_another_pace_is_not(qa, monkeypatch):
    first = play(monkeypatch, qa, Scripted(by_chance))
    slower = dataclasses.replace(qa, rules=dataclasses.replace(RULES, slots=1, timeout=5.0))
    assert play(monkeypatch, slower, Scripted(by_chance)) == first
    with pytest.raises(InputError, match=r"differs in rules.max_turns"):
        play(monkeypatch, dataclasses.replace(qa, rules=dataclasses.replace(RULES, max_turns=4)), Scripted(by_chance))


def test_every_agent_has_the_same_budget_and_all_faults_are_counted(qa, monkeypatch):
    results = play(monkeypatch, qa, Scripted(lambda request: Reply(error="out of order")))
    assert results["metrics"]["em"] == {"mean": 0.0, "interval": [0.0, 0.0]}
    assert results["faults"]["unfinished"] == results["questions"] == NUMBER
    assert results["faults"]["model_errors"] == NUMBER * RULES.max_turns
    assert (results["costs"]["calls"], results["costs"]["searches"]) == (RULES.max_turns, 0)
    searching = Scripted(lambda request: format_output({QUERY: "who"}, SO))
    always = play(monkeypatch, dataclasses.replace(qa, out=qa.out.with_name("b")), searching)
    assert always["costs"]["searches"] == RULES.max_turns - 1


def finished(example, answer, **costs):
    return Episode(Trajectory(example.id, (), State(example.question, answer=answer)), Costs(**costs))


def test_scores_are_those_worked_out_by_hand():
    examples = [Example(f"q{i}", "Who?", ("Ada Lindqvist",)) for i in range(4)]
    lost = State("Who?", (Turn(Search("x"), (), "no answer"), Turn(Search("y"), (Document("d", "D", "d"),), "sum")))
    episodes = [
        finished(examples[0], "Ada Lindqvist", calls=3, searches=2, tokens=40, dollars=0.5),
        finished(examples[1], "Ada", calls=1, tokens=8, malformed=2),
        finished(examples[2], "It is Ada Lindqvist of Morn", prompt_tokens=100, errors=1),
        Episode(Trajectory("q3", (), dataclasses.replace(lost, truncated=True)), Costs(dollars=0.25)),
    ]
    found = answer_scores(examples, episodes, seed=0)
    means = {name: metric["mean"] for name, metric in found["metrics"].items()}
    # words in common: 2 of 2, 1 of 1 and 2, 2 of 6 and 2, none
    assert means == pytest.approx({"em": 1 / 4, "f1": (1 + 2 / 3 + 1 / 2 + 0) / 4, "cover_em": 2 / 4})
    assert found["costs"] == {
        **{"calls": 1.0, "candidates": 0.0, "searches": 0.5, "digests": 0.0, "prompt_tokens": 25.0, "tokens": 12.0},
        **{"dollars": 0.1875, "dollars_in_all": 0.75},
    }
    assert found["faults"] == {
        **{"malformed": 2, "model_errors": 1, "failed_searches": 1, "failed_digests": 1, "unfinished": 1},
    }
    assert found["each"]["id"] == ["q0", "q1", "q2", "q3"]


def test_questions_with_options_have_an_accuracy():
    example = Example("q", "Which?", ("B",), options=(("A", "one"), ("B", "two")))
    found = answer_scores([example] * 2, [finished(example, "B"), finished(example, None)], seed=0)
    assert {name: metric["mean"] for name, metric in found["metrics"].items()} == dict.fromkeys(
        ("em", "f1", "cover_em", "accuracy"), 0.5
    )


def test_an_episode_is_read_as_it_was_written(tmp_path):
    example, turn = (
        Example("q", "Who?", ("x",)),
        Turn(Search("\ud800"), (Document("d", "D", "so long"),), None, "digest"),
    )
    final = State("Who?", (turn,), answer="x", thought="so")
    steps = (Step(State("Who?"), (Candidate("a", score=1.5),) * 2, 1), Step(State("Who?", (turn,)), (), 0))
    episode, log = Episode(Trajectory("q", steps, final), Costs(3, dollars=0.1)), EpisodeLog(tmp_path / "log")
    log.add(example, episode)
    assert list(log.read()) == [(example, episode)]
    assert log.path.read_text().count("so long") == 1, "a document stands once in the file"
    with pytest.raises(ValueError, match="no beginning"):
        log.add(example, Episode(Trajectory("q", steps, State("Who?", answer="x")), Costs()))


@pytest.mark.parametrize(
    ("line", "named"),
    [("{}\n", "line 2"), ("no json\n", "line 2"), ('{"example": 3}\n', "line 2"), (None, "twice")],
)
def test_a_damaged_log_is_named(tmp_path, line, named):
    log, example = EpisodeLog(tmp_path / "log"), Example("q", "Who?", ("x",))
    log.add(example, finished(example, "x"))
    log.path.write_text(log.path.read_text() + (line or log.path.read_text()))
    with pytest.raises(InputError, match=named):
        log.resume([example])


def test_a_log_of_other_questions_is_refused(tmp_path):
    log, example = EpisodeLog(tmp_path / "log"), Example("q", "Who?", ("x",))
    log.add(example, finished(example, "x"))
    with pytest.raises(InputError, match="another question now"):
        log.resume([dataclasses.replace(example, answers=("y",))])


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"agent": "oracle"}, "unknown agent"),
        ({"critic": "runs/critic"}, "a critic picks by score"),
        ({"rules": AgentRules(select="score")}, "a critic picks by score"),
        ({"rules": AgentRules(select="reward")}, "sees no reward"),
        ({"benchmark": "triviaqa"}, "unknown benchmark"),
        ({"benchmark": "medqa"}, "medqa needs its files"),
        ({"split": "exam"}, "unknown synthhop split"),
    ],
)
def test_what_cannot_be_is_refused_before_the_folder_is_claimed(qa, fields, said):
    with pytest.raises(InputError, match=said):
        evaluate(dataclasses.replace(qa, **fields))
    assert not qa.out.exists()


CHOICE = {"question": "Which?", "options": {"A": "iron", "B": "zinc"}, "answer": "zinc", "answer_idx": "B"}
PUBMED = {"QUESTION": "Does it?", "CONTEXTS": ["It did."], "LABELS": ["RESULTS"], "final_decision": "yes"}


@pytest.mark.parametrize(
    ("benchmark", "split", "file", "text", "right", "names"),
    [
        ("medqa", "test", "test.jsonl", json.dumps(CHOICE), "(B) zinc", {"em", "f1", "cover_em", "accuracy"}),
        (
            "pubmedqa",
            "labelled",
            "ori_pqal.json",
            json.dumps({"7": PUBMED}),
            "Yes.",
            {"em", "f1", "cover_em", "accuracy"},
        ),
        ("bamboogle", "test", "bamboogle.csv", "Question,Answer\nWho was?,Ada\n", "Ada", {"em", "f1", "cover_em"}),
    ],
)
def test_other_benchmarks_are_evaluated_from_their_files(qa, monkeypatch, benchmark, split, file, text, right, names):
    folder = qa.out.parent / "files"
    folder.mkdir()
    (folder / file).write_text(text)
    (folder / "corpus.jsonl").write_text('{"id": "z", "title": "Zinc", "text": "Zinc is a metal."}\n')
    asked = dataclasses.replace(qa, benchmark=benchmark, split=split, data_dir=folder, corpus=folder / "corpus.jsonl")
    scores = play(monkeypatch, asked, Scripted(lambda request: [format_output({ANSWER: right}, SO)] * 2))["metrics"]
    assert {name: found["mean"] for name, found in scores.items()} == dict.fromkeys(names, 1.0)
    wrong = dataclasses.replace(asked, out=qa.out.parent / "wrong")
    scores = play(monkeypatch, wrong, Scripted(lambda request: [format_output({ANSWER: "no idea"}, SO)] * 2))["metrics"]
    assert scores["em"]["mean"] == 0.0


def test_the_key_and_the_cache_decide_nothing(qa):
    first = eval.qa.deciding(dataclasses.replace(qa, chat=Server("m", key_variable="A", concurrency=2)))
    assert first == eval.qa.deciding(dataclasses.replace(qa, chat=Server("m", cache=qa.out)))


def test_the_limit_takes_the_first_questions(qa):
    assert len(open_questions(qa).examples) == NUMBER


@pytest.mark.parametrize(("number", "asked"), [(0, 1), (1, 1), (2, 2), (3, 4), (5, 8), (8, 8)])
def test_retrievers_are_asked_for_a_power_of_two(number, asked):
    seen = []
    even_batches(lambda queries: seen.append(len(queries)) or [(q,) for q in queries])(["q"] * number)
    assert seen == [asked]


def test_our_critic_picks_among_the_candidates_of_a_server(tmp_path):
    """The transfer experiment of the configuration, with a server on loopback and a critic of random weights."""
    write_family("llama", tmp_path / "tokenizer")
    tokenizer = HuggingFaceTokenizer.load(tmp_path / "tokenizer")
    config = DecoderConfig(tokenizer.vocab_size, model=32, layers=1, query_heads=2, kv_heads=1, head_dim=16)
    weights = init(critic_specs(config), jax.random.key(0))
    save_model(tmp_path / "critic", Model("critic", config, tokenizer, weights.replace(head=20 * weights.head), {}))
    qa = dataclasses.replace(
        qa_transfer.EXPERIMENT,
        out=tmp_path / "run",
        critic=str(tmp_path / "critic"),
        rules=dataclasses.replace(qa_transfer.EXPERIMENT.rules, max_turns=2, candidates=3),
        **{"benchmark": "synthhop", "split": "test", "limit": 3, "retriever": "bm25", "documents": 1},
    )
    with serving() as server:
        results = evaluate(dataclasses.replace(qa, chat=Server("large", base_url=server.url, prompt_price=1e5)))
        paid = len(server.seen)
        assert paid == 3 * 2
        (qa.out / "episodes.jsonl").unlink()
        again = evaluate(dataclasses.replace(qa, chat=Server("large", base_url=server.url, prompt_price=1e5)))
        assert len(server.seen) == paid, "the answers that were paid for are kept"
    assert again == results
    assert results["costs"]["candidates"] == 2 * 3
    assert results["costs"]["dollars_in_all"] == pytest.approx(paid * 10 * 1e5 / 1e6)
    steps = [step for _, episode in EpisodeLog(qa.out / "episodes.jsonl").read() for step in episode.trajectory.steps]
    assert len({c.score for step in steps for c in step.candidates}) > len(steps)
    assert all(step.chosen == max(range(3), key=lambda i: step.candidates[i].score) for step in steps)
