"""A chat model over HTTP, against a real server on loopback that misbehaves on request."""

import email.utils
import json
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tyro
from misbehaving_server import answer, choice, refusal, said, serving

from jraggym.chat_model import Completion, Message, Reply, Request
from jraggym.chats.answer_cache import AnswerCache
from jraggym.chats.answers import Fault, read_answer, read_fault
from jraggym.chats.connection import Server
from jraggym.chats.endpoint import Endpoint
from jraggym.chats.local import Local
from jraggym.chats.opening import ChatSpec, open_chat
from jraggym.chats.pace import Pace
from jraggym.errors import InputError

KEY = "sk-very-secret"


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("TEST_KEY", KEY)
    with serving() as found:
        yield found


def endpoint(server, **settings):
    defaults: dict[str, Any] = {"attempts": 3, "backoff": 0.01, "timeout": 5.0, "key_variable": "TEST_KEY"}
    return Endpoint(Server("tiny", server.url, **{**defaults, **settings}))


def ask(text, **settings):
    return Request((Message("user", text),), **settings)


# ---------------------------------------------------------------- what is sent, and what comes back


def test_a_request_goes_out_as_written_and_its_answer_comes_back(server):
    chat = endpoint(server, prompt_price=2.0, completion_price=10.0, extra='{"top_p": 0.5, "seed": null}')
    server.plan["Who?"] = [("json", 200, answer(choice("Łódź 😀"), prompt=100, completion=7))]
    request = Request((Message("system", "Be brief."), Message("user", "Who?")), 1, 0.7, 33, seed=5)
    assert chat([request]) == [Reply((Completion("Łódź 😀", 7),), 100, pytest.approx((200 + 70) / 1e6))]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}]
    body = {"model": "tiny", "messages": messages, "temperature": 0.7, "max_tokens": 33, "top_p": 0.5}
    assert server.seen == [(f"Bearer {KEY}", body)]
    assert chat([]) == []


def test_replies_stand_in_the_order_of_requests_and_equal_ones_are_asked_once(server):
    chat = endpoint(server, concurrency=4)
    server.plan["0"] = [("slow", 0.1)]
    replies = chat([ask(str(i % 6), temperature=1.0, seed=3) for i in range(12)])
    assert [reply.completions[0].text for reply in replies] == [f"{i % 6}/3/0" for i in range(12)]
    assert len(server.seen) == 6


def test_no_more_requests_are_under_way_than_allowed(server):
    server.plan = {str(i): [("slow", 0.15)] for i in range(8)}
    endpoint(server, concurrency=3)([ask(str(i)) for i in range(8)])
    assert server.most == 3


def test_candidates_come_in_one_request(server):
    [reply] = endpoint(server)([ask("a", candidates=3, temperature=1.0, seed=7)])
    assert [c.text for c in reply.completions] == ["a/7/0", "a/7/1", "a/7/2"]
    assert sum(c.tokens for c in reply.completions) == 9
    assert [body["n"] for _, body in server.seen] == [3]


def test_a_server_that_ignores_n_is_asked_n_times_with_other_seeds(server):
    server.plan["a"] = [("alone",)] * 3
    chat = endpoint(server)
    [reply] = chat([ask("a", candidates=3, temperature=1.0, seed=7)])
    assert len({c.text for c in reply.completions}) == 3
    assert reply.completions[0].text == "a/7/0"
    assert ["n" in body for _, body in server.seen] == [True, False, False]
    assert reply.prompt_tokens == chat.usage.prompt_tokens == 30


def test_a_server_that_refuses_n_is_asked_n_times(server):
    server.plan["a"] = [("json", 400, refusal("n must be 1"))]
    [reply] = endpoint(server)([ask("a", candidates=2, temperature=1.0)])
    assert len({c.text for c in reply.completions}) == 2
    assert reply.error is None


def test_too_many_choices_are_left_out(server):
    server.plan["a"] = [("json", 200, answer(*map(choice, "xyz")))]
    [reply] = endpoint(server)([ask("a", candidates=2, temperature=1.0)])
    assert [c.text for c in reply.completions] == ["x", "y"]


def test_greedy_candidates_are_paid_for_once(server):
    [reply] = endpoint(server)([ask("a", candidates=3)])
    assert [c.text for c in reply.completions] == ["a/0/0"] * 3
    assert len(server.seen) == 1


def test_a_cut_answer_and_log_probabilities_are_reported(server):
    steps = {"content": [{"logprob": -0.5}, {"logprob": -0.25}]}
    server.plan["a"] = [("json", 200, answer(choice("on and", "length", logprobs=steps), choice(None, "length")))]
    [reply] = endpoint(server, logprobs=True)([ask("a", candidates=2, temperature=1.0)])
    first, second = reply.completions
    assert first == Completion("on and", 2, -0.75, cut=True)
    assert (second.text, second.logprob, second.cut) == ("", None, True)
    assert server.seen[0][1]["logprobs"] is True


# ---------------------------------------------------------------- what goes wrong and passes

MALFORMED = [
    ("text", 200, ""),
    ("text", 200, '{"choices": ['),
    ("text", 200, "[" * 100_000),
    ("text", 200, "[]"),
    ("json", 200, {"choices": [choice("x")]}),
    ("json", 200, {**answer(choice("x")), "usage": {"prompt_tokens": True, "completion_tokens": 1}}),
    ("json", 200, answer()),
    ("json", 200, answer(choice(None))),
    ("json", 200, answer(choice(3))),
    ("json", 200, answer({"message": {"content": "x"}})),
    ("json", 200, answer(choice("x", logprobs={"content": [{"logprob": None}]}))),
]
PASSING = [
    *((("json", status, refusal("later")), f"the server answered {status}: later") for status in (408, 409, 429, 503)),
    (("text", 500, "<html>\x1b[31moops"), "the server answered 500: <html> [31moops"),
    (("cut", 200, said({"messages": [{"content": "a"}], "seed": 0})), "no answer: RemoteProtocolError"),
    (("hang",), "no answer: ReadTimeout"),
    *((plan, "the answer cannot be read") for plan in MALFORMED),
]


@pytest.mark.parametrize(("plan", "message"), PASSING)
def test_a_fault_that_passes_is_retried_and_one_that_stays_is_recorded(server, plan, message):
    chat = endpoint(server, attempts=2, timeout=1.0 if plan == ("hang",) else 10.0)
    server.plan = {"twice": [plan, plan], "once": [plan]}
    once, twice, never = chat([ask("once"), ask("twice"), ask("never")])
    assert once.error is None
    assert once.completions[0].text == "once/0/0"
    assert twice.completions == ()
    assert twice.error is not None
    assert message in twice.error
    assert "\x1b" not in twice.error
    assert len(twice.error) < 500
    assert never.completions[0].text == "never/0/0"
    assert len(server.seen) == 5
    assert (chat.usage.retries, chat.usage.errors, chat.usage.answers) == (2, 1, 2)


def test_a_server_that_is_not_there_is_an_error_of_each_reply():
    with serving() as gone:
        pass
    [reply] = Endpoint(Server("tiny", gone.url, attempts=2, backoff=0.01))([ask("a")])
    assert "no answer: ConnectError" in (reply.error or "")


def test_a_drip_of_blanks_is_read_but_does_not_stretch_the_timeout(server):
    server.plan = {"a": [("drip", 3)], "b": [("drip", 20)]}
    patient, hasty = endpoint(server, timeout=5.0), endpoint(server, timeout=0.3, attempts=1)
    assert patient([ask("a")])[0].completions[0].text == "a/0/0"
    assert "not whole after 0.3 s" in (hasty([ask("b")])[0].error or "")


def test_the_server_says_how_long_to_wait(server, monkeypatch):
    waits = []
    chat = endpoint(server, patience=50.0)
    monkeypatch.setattr("tenacity.sleep_using_event", lambda event: waits.append)
    monkeypatch.setattr(chat._connection._requests, "hold", waits.append)
    limited = ("json", 429, refusal("slow down"), [("Retry-After", "7")])
    server.plan["a"] = [limited, limited]
    assert chat([ask("a")])[0].error is None
    assert waits == [7.0] * 4
    server.plan["b"] = [("json", 503, refusal("tomorrow"), [("Retry-After", "51")])]
    [reply] = chat([ask("b")])
    assert reply.error == "the server answered 503: tomorrow (it asks to wait 51 s)"


def test_retry_after_may_be_a_date():
    for text, least, most in [("3", 3, 3), ("nonsense", 0, 0), ("-5", 0, 0), ("inf", 0, 0), ("nan", 0, 0)]:
        assert least <= read_fault(429, {"retry-after": text}, "").after <= most
    later = email.utils.formatdate(time.time() + 100, usegmt=True)
    assert 90 < read_fault(429, {"retry-after": later}, "").after <= 100


def test_a_request_that_the_server_refuses_is_not_repeated(server):
    server.plan["long"] = [("json", 400, refusal("maximum context length is 8192 tokens"))]
    long, fine = endpoint(server)([ask("long"), ask("fine")])
    assert long.error == "the server answered 400: maximum context length is 8192 tokens"
    assert fine.error is None
    assert len(server.seen) == 2


def test_a_request_for_nothing_is_an_error_of_its_reply(server):
    replies = endpoint(server)([ask("a", candidates=0), ask("a", candidates=0, temperature=1.0), ask("a")])
    assert [reply.error is None for reply in replies] == [False, False, True]
    assert len(server.seen) == 1


def test_letters_that_no_encoding_has_raise_nothing(server):
    assert endpoint(server)([ask("half a \ud83d pair")])[0].error is None


# ---------------------------------------------------------------- what no request survives


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (401, refusal(f"Incorrect API key provided: {KEY}."), r"Incorrect API key provided: \[the key\]"),
        (404, refusal("The model `tiny` does not exist"), "The model `tiny` does not exist"),
        (429, refusal("You exceeded your current quota", "insufficient_quota"), "exceeded your current quota"),
        (402, {"error": "no credits"}, "no credits"),
    ],
)
def test_a_wrong_key_or_model_ends_the_call_at_once(server, status, body, words):
    texts = [str(i) for i in range(50)]
    server.plan = {text: [("json", status, body)] for text in texts}
    with pytest.raises(InputError, match=words) as raised:
        endpoint(server, concurrency=2)([ask(text) for text in texts])
    assert KEY not in str(raised.value)
    assert len(server.seen) < 50, "the other requests were not called off"


def test_the_key_is_read_from_the_named_variable_alone_and_never_shown(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    endpoint(server, key_variable=None)([ask("a")])
    assert server.seen[0][0] is None
    chat = endpoint(server)
    server.plan["b"] = [("json", 400, refusal(f"what is {KEY}?"))]
    [reply] = chat([ask("b")])
    assert KEY not in f"{reply} {chat!r} {chat.server}"
    for value in ("", "two\nlines", "schlüssel"):
        monkeypatch.setenv("TEST_KEY", value)
        with pytest.raises(InputError, match="no API key in the environment variable TEST_KEY") as raised:
            endpoint(server)
        assert not value or value not in str(raised.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"base_url": "localhost:8000/v1"}, "base_url is no address"),
        ({"base_url": "http://user:word@host/v1"}, "base_url holds a password"),
        ({"concurrency": 0}, "concurrency is too low"),
        ({"attempts": 0}, "attempts is too low"),
        ({"completion_price": -1.0}, "completion_price is too low"),
        ({"timeout": 0.0}, "timeout must be positive"),
        ({"requests_per_minute": 0.0}, "rate limit must be positive"),
        ({"extra": "{"}, "extra is no JSON"),
        ({"extra": "[1]"}, "extra is no JSON object"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, words):
    with pytest.raises(InputError, match=words):
        open_chat(Server(**{"model": "tiny", "base_url": "http://127.0.0.1:1/v1", **settings}))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["server", "--model", "m", "--cache", "a.sqlite"], Server("m", cache=Path("a.sqlite"))),
        (
            ["server", "--model", "m", "--key-variable", "K", "--prompt-price", "2", "--tokens-per-minute", "1e5"],
            Server("m", key_variable="K", prompt_price=2.0, tokens_per_minute=1e5),
        ),
        (["local", "--model", "runs/sft/model", "--truncate"], Local("runs/sft/model", truncate=True)),
    ],
)
def test_chat_models_are_named_on_the_command_line(arguments, expected):
    assert tyro.cli(ChatSpec, args=arguments) == expected  # type: ignore[arg-type]


# ---------------------------------------------------------------- the cache


def test_what_was_answered_is_not_paid_for_again(server, tmp_path):
    kept = {"cache": tmp_path / "new" / "answers.sqlite", "prompt_price": 1.0}
    requests = [ask(text, candidates=2, temperature=1.0) for text in "abc"]
    server.plan = {"b": [("json", 400, refusal("no"))] * 2, "c": [("alone",), ("text", 200, "{")]}
    chat = endpoint(server, attempts=1, **kept)
    first = chat(requests)
    assert [reply.error is None for reply in first] == [True, False, False]
    assert first[2].cost == 10 / 1e6, "what was paid before the fault counts"
    before = len(server.seen)
    chat = endpoint(server, **kept)
    second = chat(requests)
    assert second[0] == first[0]
    assert all(reply.error is None for reply in second)
    # b anew as one request of two, c only its second candidate
    assert len(server.seen) == before + 2
    assert (chat.usage.answers, chat.usage.cached) == (2, 2)
    assert chat.usage.cost == pytest.approx(20 / 1e6)
    assert chat(requests) == second
    assert len(server.seen) == before + 2


def test_any_other_request_is_another_question(server, tmp_path):
    chat = endpoint(server, cache=tmp_path / "answers.sqlite")
    one = ask("a", temperature=1.0)
    others = [replace(one, **change) for change in ({"seed": 1}, {"temperature": 0.5}, {"max_tokens": 9})]
    chat([one, *others, replace(one, messages=(Message("system", "a"), *one.messages))])
    assert len(server.seen) == 5
    endpoint(server, cache=tmp_path / "answers.sqlite", extra='{"top_p": 0.5}')([one])
    assert len(server.seen) == 6
    endpoint(server, cache=tmp_path / "answers.sqlite", key_variable=None)([one])
    assert len(server.seen) == 6, "a new key makes no new question"
    assert KEY.encode() not in (tmp_path / "answers.sqlite").read_bytes()


def test_answers_that_came_before_a_call_was_ended_are_kept(server, tmp_path):
    server.plan = {"b": [("json", 401, refusal("expired"))]}
    path = tmp_path / "answers.sqlite"
    with pytest.raises(InputError):
        endpoint(server, concurrency=1, cache=path)([ask("a"), ask("b")])
    assert endpoint(server, cache=path)([ask("a")])[0].error is None
    assert len(server.seen) == 2


KILLED = """
import sys
from pathlib import Path
from jraggym.chat_model import Message, Request
from jraggym.chats.connection import Server
from jraggym.chats.endpoint import Endpoint
chat = Endpoint(Server("tiny", sys.argv[1], cache=Path(sys.argv[2]), concurrency=2))
chat([Request((Message("user", str(i)),)) for i in range(9)])
"""


def test_a_killed_call_pays_for_nothing_twice(server, tmp_path):
    server.plan = {text: [("hang",)] for text in "567"}
    path = tmp_path / "answers.sqlite"
    process = subprocess.Popen([sys.executable, "-c", KILLED, server.url, str(path)])
    until(lambda: len(server.seen) == 7, 30.0)  # five answers, and two that hang
    process.send_signal(signal.SIGKILL)
    process.wait()
    server.plan.clear()
    replies = endpoint(server, cache=path)([ask(str(i)) for i in range(9)])
    assert [reply.completions[0].text for reply in replies] == [f"{i}/0/0" for i in range(9)]
    assert len(server.seen) == 7 + 4


def until(happened, seconds):
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def test_a_cache_that_is_none_is_refused(server, tmp_path):
    (tmp_path / "notes.txt").write_text("not a table\n" * 99)
    for path in (tmp_path / "notes.txt", tmp_path, tmp_path / "notes.txt" / "answers"):
        with pytest.raises(InputError, match="cannot keep answers in"):
            endpoint(server, cache=path)([ask("a")])
    assert (tmp_path / "notes.txt").read_text().startswith("not a table")


def test_threads_share_a_cache(tmp_path):
    with AnswerCache(tmp_path / "answers.sqlite") as cache:
        threads = [threading.Thread(target=cache.put, args=({"n": i}, str(i))) for i in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [cache.get({"n": i}) for i in range(21)] == [*map(str, range(20)), None]


# ---------------------------------------------------------------- rates


def test_a_pace_spaces_out_what_is_taken():
    now = [100.0]
    pace = Pace(60.0, lambda: now[0])  # one a second
    assert [pace.take(1) for _ in range(3)] == [0.0, 1.0, 2.0]
    pace.give_back(2)
    assert pace.take(5) == 1.0
    now[0] = 1_000.0
    assert [pace.take(1), pace.take(1)] == [0.0, 1.0], "a quiet time saves nothing up"
    pace.hold(30.0)
    assert pace.take(1) == 30.0
    free = Pace(float("inf"), lambda: now[0])
    assert [free.take(10**9), free.take(1)] == [0.0, 0.0]


def test_requests_and_tokens_are_paced_and_settled_by_what_was_used(server, monkeypatch):
    chat = endpoint(server, requests_per_minute=600, tokens_per_minute=1e6)
    seen = []
    for name in ("_requests", "_tokens"):
        pace = getattr(chat._connection, name)
        monkeypatch.setattr(pace, "take", lambda amount, name=name: seen.append((name, amount)) or 0.0)
        monkeypatch.setattr(pace, "give_back", lambda amount, name=name: seen.append((f"-{name}", amount)))
    server.plan["word" * 10] = [("json", 500, refusal("oops"))]
    chat([ask("word" * 10, candidates=2, temperature=1.0, max_tokens=50)])
    taken = [("_requests", 1), ("_tokens", 110)]
    assert seen == [*taken, *taken, ("-_tokens", 110 - 10 - 6)]


# ---------------------------------------------------------------- the strict reader


def test_tokens_are_shared_by_length_and_none_is_lost():
    found = read_answer(json.dumps(answer(choice("x" * 79), choice("x" * 19), choice(""), completion=101)))
    assert [c.tokens for c in found.completions] == [80, 20, 1]
    assert sum(c.tokens for c in found.completions) == found.completion_tokens


def test_a_refusal_of_the_model_is_its_text():
    body = answer({"message": {"content": None, "refusal": "I won't."}, "finish_reason": "stop"})
    assert read_answer(json.dumps(body)).completions[0].text == "I won't."
    with pytest.raises(Fault, match="content None with finish_reason 'content_filter'"):
        read_answer(json.dumps(answer(choice(None, "content_filter"))))
