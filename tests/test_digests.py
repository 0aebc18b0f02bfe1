"""Digests of searches: made once, kept on disk, and asked for again after a failure."""

import pytest
from agent_world import FOUND, QUESTION, digest_model, replies

from jraggym.agents.digests import Digest, Summariser
from jraggym.chat_model import Reply
from jraggym.errors import InputError

ASKED = (QUESTION, "Morn mayor", FOUND["Morn mayor"])


def test_a_digest_is_made_once_for_a_question_a_query_and_documents():
    model = digest_model()
    summariser = Summariser(model)
    first, second = summariser([ASKED, ASKED])
    assert first == second == summariser([ASKED])[0]
    assert (first.text, first.error, first.cost, first.tokens) == ("The mayor is Ada Lindqvist.", None, 0.25, 5)
    assert len(model.requests) == 1
    others = [("another", *ASKED[1:]), (*ASKED[:2], FOUND[QUESTION]), (QUESTION, "source of the Tarvan", ASKED[2])]
    summariser(others)
    assert len(model.requests) == 4
    assert len(model.batches) == 2


def test_a_failed_digest_is_asked_again():
    model = replies(Reply(error="busy"), "", "It is Ada.")
    summariser = Summariser(model)
    errors = [summariser([ASKED])[0].error for _ in range(3)]
    assert errors == ["busy", "an empty digest", None]
    assert summariser([ASKED])[0].text == "It is Ada."


def test_digests_outlive_a_kill(tmp_path):
    path = tmp_path / "deep" / "digests.jsonl"
    [digest] = Summariser(digest_model(), "m", path=path)([ASKED])
    path.write_bytes(path.read_bytes() + b'{"key": "cut o')
    assert Summariser(replies(), "m", path=path)([ASKED]) == [digest]
    assert path.read_bytes().endswith(b"}\n"), "the torn line is gone"
    assert Summariser(replies("other"), "another model", path=path)([ASKED]) == [Digest("other", *_usage(), 1, 0.25)]
    assert len(path.read_text().splitlines()) == 2
    path.write_text('{"no": "digest"}\n')
    with pytest.raises(InputError, match="line 1"):
        Summariser(replies(), path=path)


def _usage():
    model = digest_model()
    return (Summariser(model)([ASKED])[0].prompt_tokens,)
