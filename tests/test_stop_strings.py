"""Stop strings are found in the text, whatever tokens it is written in."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jraggym.errors import InputError
from jraggym.text.stop_strings import stop_table, token_texts
from jraggym.text.tokenizer import SentencePieceTokenizer

STOPS = ("</a>", "a</b>", "<<")


def ends_at(table, ids):
    """After how many tokens the turn has ended, or None."""
    state = 0
    for number, i in enumerate(ids, 1):
        state = table.step[state, i]
        if table.done[state]:
            return number
    return None


@given(st.lists(st.text("</ab>", min_size=1, max_size=5), min_size=1, max_size=9), st.data())
def test_a_turn_ends_with_the_token_that_completes_a_stop(words, data):
    table = stop_table([word.encode() for word in words], STOPS)
    ids = data.draw(st.lists(st.integers(0, len(words) - 1), max_size=12))
    written = ["".join(words[i] for i in ids[:n]) for n in range(1, len(ids) + 1)]
    expected = next((n for n, text in enumerate(written, 1) if any(stop in text for stop in STOPS)), None)
    assert ends_at(table, ids) == expected


@pytest.mark.parametrize("vocabulary", [300, 360])
def test_a_tag_in_one_token_or_in_several(vocabulary):
    tokenizer = SentencePieceTokenizer.train(["the information of </information> and a <b>"] * 3, vocabulary)
    table = stop_table(token_texts(tokenizer), ("</search>", "</information>"))
    for text, rest in (("who is it?</search>", " the"), ("x </ information </information>", " and")):
        (ids,), (more,) = tokenizer.encode([text]), tokenizer.encode([rest])
        assert ends_at(table, ids + more) == len(ids)
    assert ends_at(table, tokenizer.encode(["</searchin </informations"])[0]) is None


def test_texts_of_tokens_stand_behind_other_text():
    tokenizer = SentencePieceTokenizer.train(["the river rises in the hills"] * 3, 300)
    texts = token_texts(tokenizer)
    (ids,) = tokenizer.encode([" the river rises in the hills"])
    assert b"".join(texts[i] for i in ids).decode() == " the river rises in the hills"


def test_end_tokens_end_a_turn_whatever_they_write():
    table = stop_table([b"", b"x", b"</a>"], (), ends=[0])
    assert ends_at(table, [1, 2, 0, 1]) == 3
    assert np.all(table.step[1] == 1)  # what has ended stays so


def test_something_must_end_a_turn():
    for stops in ((), ("",)):
        with pytest.raises(InputError, match="ends it"):
            stop_table([b"x"], stops)
