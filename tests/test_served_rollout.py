"""Rollouts through a serving engine, a process of its own: token by token those of the jitted program."""

import dataclasses
import json
import re
import time

import jax
import numpy as np
import pytest
from engine_server import END, PieceTokenizer, engine
from hf_samples import sample_model
from toy_world import Watched, toy_examples, toy_retriever

from jraggym.batch import ProcessBatch
from jraggym.chats.answers import Fault, NoTokens, read_token_answer
from jraggym.chats.connection import Server
from jraggym.errors import InputError
from jraggym.objectives.forward import token_logprobs
from jraggym.objectives.policy import Experience, PolicyLoss, policy_loss
from jraggym.protocols.search_o1_tags import SEARCH_O1_TAGS
from jraggym.protocols.search_r1 import SEARCH_R1
from jraggym.sampling import Sampling
from jraggym.served_rollout import ServedRollout
from jraggym.text.stop_strings import stop_table, turn_end
from jraggym.transcript_episode import Limits, OpenEpisode, TranscriptRules
from jraggym.transcript_rollout import Engine, TranscriptRollout
from jraggym.types import Document, Segment

LIMITS = Limits(turns=4, searches=2, turn=6, observation=9, total=64, prompt=12)
RULES = TranscriptRules(SEARCH_R1, PieceTokenizer(), LIMITS, frozenset({END}))
EXAMPLES = tuple(example for example in toy_examples(8) for _ in range(2))  # groups of two
PROMPTS = [[3 + (7 * i + 5 * j) % 60 for j in range(6 + i % 5)] for i in range(8) for _ in range(2)]
GREEDY = Sampling(temperature=0.0)


@pytest.fixture(scope="module")
def served():
    with engine() as found:
        yield found


@pytest.fixture(autouse=True)
def no_plan(served, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    served.plan()


def make(served, sampling=GREEDY, retriever=None, **settings):
    server = Server("tiny", served.url, **{"attempts": 3, "backoff": 0.01, "timeout": 20.0, **settings})
    retriever = retriever or toy_retriever()
    return ServedRollout(server, RULES, retriever, sampling)


@pytest.fixture(scope="module")
def greedy(served):
    """Episodes without any fault, and what they cost."""
    return make(served, prompt_price=2.0, completion_price=10.0).run(EXAMPLES, PROMPTS, 0)


def view(episode):
    t = episode.transcript
    return (t.ids.tolist(), t.segment.tolist(), t.turn.tolist(), episode.queries, episode.answer, episode.ended)


def views(episodes):
    return [view(episode) for episode in episodes]


# ---------------------------------------------------------------- the same episodes


def test_greedy_episodes_are_those_of_the_jitted_rollout_token_by_token(greedy):
    _, config, weights = sample_model("llama")
    rollout = TranscriptRollout(config, RULES, toy_retriever(), GREEDY, Engine(4, 0.1, 3, 2, 4))
    expected, report = rollout.run(weights, EXAMPLES, PROMPTS, jax.random.key(0))
    episodes, usage = greedy
    kinds = {int(s) for e in expected for s in e.transcript.segment}
    assert kinds >= {Segment.PROMPT, Segment.MODEL, Segment.OBSERVATION, Segment.INVALID}, "a dull world"
    assert max(int(e.transcript.turn.max()) for e in expected) >= 2
    assert views(episodes) == views(expected)
    for served, jitted in zip(episodes, expected, strict=True):
        assert dataclasses.replace(served, transcript=jitted.transcript) == jitted
        np.testing.assert_allclose(served.transcript.logprob, jitted.transcript.logprob, atol=1e-4)
    turns = sum(len({*e.transcript.turn[e.transcript.segment == Segment.MODEL]}) for e in episodes)
    assert (usage.answers, usage.errors, usage.retries) == (turns, 0, 0)
    assert usage.completion_tokens == report.drawn
    assert usage.cost == pytest.approx((2 * usage.prompt_tokens + 10 * usage.completion_tokens) / 1e6)


def test_a_request_holds_ids_and_all_that_decides_the_draw(served):
    finished = []
    episodes, _ = make(served, Sampling(temperature=0.7, top_p=0.9, top_k=5), extra='{"min_p": null}').run(
        EXAMPLES, PROMPTS, 5, report=finished.append
    )
    seen = served.seen()
    assert len(seen) > len(EXAMPLES), "no second turns"
    first = next(body for body in seen if body["prompt"] == PROMPTS[0])
    rest = {name: value for name, value in first.items() if name not in ("prompt", "seed")}
    assert rest == {
        "model": "tiny", "max_tokens": 6, "temperature": 0.7, "top_p": 0.9, "top_k": 5, "repetition_penalty": 1.0,
        "stop": ["</search>", "</answer>"], "stop_token_ids": [END], "include_stop_str_in_output": True,
        "skip_special_tokens": False, "spaces_between_special_tokens": False, "logprobs": 1, "return_token_ids": True,
    }  # fmt: skip
    assert len({body["seed"] for body in seen}) == len(seen), "each episode and turn has its own seed"
    for body in seen:
        assert any(body["prompt"] == e.transcript.ids[: len(body["prompt"])].tolist() for e in episodes)
    assert (finished, finished[-1]) == (sorted(finished), len(EXAMPLES))


def test_as_many_episodes_as_allowed_are_under_way_and_searches_that_are_ready_go_together(served):
    def slow(number, found):
        while number == 0 and len(served.seen()) < len(EXAMPLES):  # all have their first turn, or nearly so
            time.sleep(0.05)
        time.sleep(0.5 * (number == 0))
        return found

    watched = Watched(toy_retriever(), slow)
    make(served, retriever=watched, concurrency=16).run(EXAMPLES, PROMPTS, 0)
    assert max(map(len, watched.calls)) > 1
    served.plan((prompt, ["slow"]) for prompt in PROMPTS[::2])
    make(served, concurrency=3).run(EXAMPLES, PROMPTS, 0)
    assert served.seen("most") == 3


def test_an_episode_is_decided_by_the_seed_and_its_name(served):
    alone, many = make(served, Sampling(), concurrency=1), make(served, Sampling(), concurrency=16)
    episodes, _ = many.run(EXAMPLES, PROMPTS, 7)
    again, _ = alone.run(EXAMPLES[:6], PROMPTS[:6], 7)
    assert views(again) == views(episodes[:6])
    assert len({str(view(e)) for e in episodes}) > len(EXAMPLES) // 2, "copies of a question draw alike"
    before = len(served.seen())
    other, more = alone.run(EXAMPLES[:6], PROMPTS[:6], 8)
    assert views(other) != views(again)
    assert more.answers == len(served.seen()) - before, "each run counts its own"


def test_who_may_not_search_does_not(served):
    watched = Watched(toy_retriever())
    episodes, _ = make(served, retriever=watched).run(EXAMPLES, PROMPTS, 0, may_search=[False] * len(EXAMPLES))
    assert watched.calls == []
    assert not any(e.may_search or e.queries for e in episodes)


# ---------------------------------------------------------------- what a trainer makes of them


def batch_of(episodes):
    """The episodes side by side, one candidate each."""
    p, a = LIMITS.prompt, LIMITS.total
    b = len(episodes)
    prompt, prompt_mask = np.zeros((b, p), np.int32), np.zeros((b, p), bool)
    action, action_mask, own = np.zeros((b, 1, a), np.int32), np.zeros((b, 1, a), bool), np.zeros((b, 1, a), bool)
    logprob = np.zeros((b, 1, a), np.float32)
    for i, episode in enumerate(episodes):
        t, r = episode.transcript.prompt, episode.transcript.response
        prompt[i, p - len(t) :], prompt_mask[i, p - len(t) :] = t, True
        action[i, 0, : len(r)], action_mask[i, 0, : len(r)] = r.ids, True
        own[i, 0, : len(r)], logprob[i, 0, : len(r)] = r.segment == Segment.MODEL, r.logprob
    reward, real = np.zeros((b, 1), np.float32), np.ones((b, 1), bool)
    return ProcessBatch(prompt, prompt_mask, action, action_mask, own, reward, real, logprob)


def test_the_engines_logprobs_are_the_behaviour_that_importance_sampling_is_truncated_by(served):
    _, config, weights = sample_model("llama")
    episodes, _ = make(served, Sampling()).run(EXAMPLES, PROMPTS, 3)
    batch = batch_of(episodes)
    own = np.asarray(batch.own)
    fresh = np.asarray(token_logprobs(weights, config, batch))
    np.testing.assert_allclose(fresh[own], batch.behaviour_logprob[own], atol=1e-4)
    # The engine now serves weights of some steps ago.
    later = jax.tree.map(lambda x: 1.1 * x, weights)
    old = np.asarray(token_logprobs(later, config, batch))
    advantage = np.where(np.arange(len(episodes))[:, None, None] % 2, 1.0, -0.5) * np.ones_like(old)
    how = PolicyLoss(truncate=1.2)
    loss, _ = policy_loss(old, Experience(batch, advantage, old), how)
    weight = np.exp(old - batch.behaviour_logprob)
    assert (weight[own] > 1.2).any(), "nothing to truncate"
    assert (weight[own] < 1.2).any()
    expected = np.mean((-advantage * np.minimum(weight, 1.2))[own])
    assert float(loss) == pytest.approx(expected, rel=1e-4)
    same, _ = policy_loss(fresh, Experience(batch, advantage, fresh), how)
    off, _ = policy_loss(fresh, Experience(batch, advantage, fresh), PolicyLoss())
    assert float(same) == pytest.approx(float(off), rel=1e-3)


# ---------------------------------------------------------------- what goes wrong

PASSING = ["429", "500", "cut", "few logprobs", "aborted"]
FINAL = [
    ("400", "the server answered 400: error 400"),
    ("other text", "ids and text differ"),
    ("other prompt", "the engine has read .* ids that are not the prompt's"),
    ("strange id", "the engine drew id 64; the tokenizer has 64"),
    ("no stop", "the engine stopped where no turn ends .its last id is 30."),
]


def test_faults_that_pass_are_retried_and_change_nothing(served, greedy):
    served.plan((PROMPTS[2 * i], [fault]) for i, fault in enumerate(PASSING))
    episodes, usage = make(served).run(EXAMPLES, PROMPTS, 0)
    assert views(episodes) == views(greedy[0])
    assert (usage.retries, usage.errors) == (len(PASSING), 0)


@pytest.mark.parametrize(("fault", "message"), FINAL)
def test_a_request_that_fails_ends_its_episode_and_not_the_run(served, greedy, fault, message):
    served.plan([(PROMPTS[4], [fault])])  # one of two copies
    episodes, usage = make(served).run(EXAMPLES, PROMPTS, 0)
    [failed] = [i for i, episode in enumerate(episodes) if episode.error is not None]
    assert failed in (4, 5)
    assert re.match(message, episodes[failed].error)
    assert episodes[failed].transcript.ids.tolist() == PROMPTS[4]
    assert (episodes[failed].ended, episodes[failed].answer, episodes[failed].pieces) == (False, None, ())
    left = [i for i in range(len(episodes)) if i != failed]
    assert views(episodes[i] for i in left) == views(greedy[0][i] for i in left)
    assert (usage.errors, usage.retries) == (1, 0)


def test_a_fault_in_a_later_turn_keeps_what_came_before(served, greedy):
    chosen = next(e for e in greedy[0] if e.queries)
    own = chosen.transcript.turn[chosen.transcript.segment == Segment.MODEL]
    second = int(np.flatnonzero((chosen.transcript.turn == 1) & (chosen.transcript.segment == Segment.MODEL))[0])
    assert max(own) >= 1
    served.plan([(chosen.transcript.ids[:second].tolist(), ["400", "400"])])
    i = next(i for i, e in enumerate(EXAMPLES) if e.id == chosen.example_id)
    [episode], _ = make(served).run(EXAMPLES[i : i + 1], PROMPTS[i : i + 1], 0)
    assert episode.error == "the server answered 400: error 400"
    assert episode.transcript.ids.tolist() == chosen.transcript.ids[:second].tolist()
    assert episode.queries == chosen.queries[:1]


@pytest.mark.parametrize(("fault", "words"), [("token_ids", "no token ids"), ("logprobs", "no log-probabilities")])
def test_an_engine_without_ids_or_logprobs_is_refused(served, fault, words):
    served.plan((prompt, [fault, fault]) for prompt in PROMPTS)
    with pytest.raises(InputError, match=f"{words}.*none are made from text") as refused:
        make(served, concurrency=2).run(EXAMPLES, PROMPTS, 0)
    assert "return_token_ids" in str(refused.value)
    assert len(served.seen()) < len(EXAMPLES), "the other requests were not called off"


def test_what_lies_behind_the_end_of_a_turn_is_cut(served, greedy):
    served.plan((prompt, ["beyond", "beyond"]) for e, prompt in zip(greedy[0], PROMPTS, strict=True) if e.queries)
    assert views(make(served).run(EXAMPLES, PROMPTS, 0)[0]) == views(greedy[0])


def test_a_retriever_that_fails_ends_the_episodes_that_asked(served, greedy):
    def fails(number, found):
        raise OSError("the index is gone")

    watched = Watched(toy_retriever(), fails)
    episodes, usage = make(served, retriever=watched).run(EXAMPLES, PROMPTS, 0)
    asked = [bool(e.queries) for e in greedy[0]]
    assert [e.error == "OSError: the index is gone" for e in episodes] == asked
    assert any(asked)
    assert usage.errors == 0, "the engine did its part"


def test_a_known_query_does_not_end_by_a_search_of_others():
    rules = TranscriptRules(SEARCH_O1_TAGS, PieceTokenizer(), ends=frozenset({END}))
    protocol = dataclasses.replace(SEARCH_O1_TAGS, digests=False)
    rules = dataclasses.replace(rules, protocol=protocol)
    episode = OpenEpisode.start(rules, 0, EXAMPLES[0], PROMPTS[0], True)
    turn = "<|begin_search_query|>Morn<|end_search_query|>"
    assert episode.act([30], np.array([-1.0]), turn) == "Morn"
    assert episode.observe((Document("d", "Morn", "A town."),)) is None
    assert episode.act([30], np.array([-1.0]), turn) == ""
    assert episode.observe(None, "the index is gone") is None
    assert episode.transcript.segment[-1] == Segment.OBSERVATION
    assert episode.act([30], np.array([-1.0]), turn.replace("Morn", "Ada")) == "Ada"
    whole = episode.observe(None, "the index is gone")
    assert whole is not None
    assert (whole.error, whole.queries) == ("the index is gone", ("Morn",))


def test_settings_that_cannot_be_are_refused(served, tmp_path):
    with pytest.raises(InputError, match="a rollout keeps no answers"):
        make(served, cache=tmp_path / "answers.sqlite")
    with pytest.raises(InputError, match=r"prompts do not fit their limit.*e0"):
        make(served).run(EXAMPLES[:1], [[3] * 13], 0)


# ---------------------------------------------------------------- the strict reader

GOOD = {
    "text": "ab",
    "token_ids": [3, 4],
    "prompt_token_ids": None,
    "finish_reason": "stop",
    "logprobs": {"token_logprobs": [-0.5, 2e-5]},
}


def body(usage=(7, 2), **changes):
    counts = {"prompt_tokens": usage[0], "completion_tokens": usage[1]}
    return json.dumps({"choices": [{**GOOD, **changes}], "usage": counts})


def test_an_answer_with_token_ids_is_read():
    found = read_token_answer(body())
    assert (found.ids, found.logprobs, found.text, found.cut) == ((3, 4), (-0.5, 2e-5), "ab", False)
    assert (found.prompt, found.prompt_tokens, found.completion_tokens) == (None, 7, 2)
    assert read_token_answer(body(finish_reason="length", prompt_token_ids=[9])).cut


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"choices": [], "usage": {}}',
        body(usage=(True, 2)),
        body(text=None),
        body(finish_reason="abort"),
        body(finish_reason=None),
        body(token_ids=[]),
        body(token_ids=[3, -4]),
        body(token_ids=["3", "4"]),
        body(prompt_token_ids=[1.5]),
        body(logprobs={"token_logprobs": [-0.5]}),
        body(logprobs={"token_logprobs": [-0.5, None]}),
        body(logprobs={"token_logprobs": [-0.5, 0.3]}),
        body(logprobs={"token_logprobs": [-0.5, float("nan")]}),
        body(logprobs={"token_logprobs": [-0.5, float("-inf")]}),
        body(logprobs={"content": []}),
    ],
)
def test_a_damaged_answer_is_a_fault_that_may_pass(text):
    with pytest.raises(Fault, match="the answer cannot be read") as fault:
        read_token_answer(text)
    assert fault.value.passing


@pytest.mark.parametrize("missing", ["token_ids", "logprobs"])
def test_answers_of_text_alone_are_hopeless(missing):
    with pytest.raises(NoTokens):
        read_token_answer(body(**{missing: None}))


def test_the_end_of_a_turn_is_found_across_tokens():
    table = stop_table([b"x", b"</se", b"arch>", b"arch> y", b""], ("</search>",), (4,))
    assert turn_end(table, [0, 1, 2, 0]) == 3
    assert turn_end(table, [1, 3]) == 2
    assert turn_end(table, [0, 4, 0]) == 2
    assert turn_end(table, [1, 0, 2]) is None
    assert turn_end(table, []) is None
