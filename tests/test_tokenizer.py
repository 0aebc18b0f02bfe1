"""The tokenizer: markers are single tokens, text comes back as it went in, and ids grow only at the end."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jraggym.errors import InputError
from jraggym.text.rendering import FINISH, MARKERS, render
from jraggym.text.tokenizer import SentencePieceTokenizer
from jraggym.types import Document, Malformed, Search, State, Turn

TEXTS = [
    "<question> Who is the mayor of the birthplace of Torvan?",
    "<search> Torvan birthplace</search>",
    "<document> Torvan | Torvan is a person with birthplace Bexlis, employer Quilmer and spouse Adalin.",
    "<think> birthplace Bexlis</think><search> Bexlis mayor</search>",
    "<document> Bexlis | Governed by the mayor Marnos, Bexlis has twin Portlund.",
    "<answer> Marnos</answer>",
] * 5
UNKNOWN = 1

# Lone surrogates are no Unicode text, and U+2581 is SentencePiece's own sign for a space: it comes back as one.
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=40)


@pytest.fixture(scope="module")
def tokenizer():
    return SentencePieceTokenizer.train(TEXTS, 420)


def ids(tokenizer, segments):
    return [i for segment in tokenizer.encode(segments) for i in segment]


@pytest.mark.parametrize("marker", MARKERS)
def test_every_marker_is_one_token(tokenizer, marker):
    assert tokenizer.encode([marker]) == [[tokenizer.token_id(marker)]]
    inside = tokenizer.encode([f"Torvan{marker} Bexlis"])[0]
    assert inside.count(tokenizer.token_id(marker)) == 1
    assert tokenizer.decode([[tokenizer.token_id(marker)]]) == [marker]


def test_marker_ids_differ_from_each_other_and_from_padding(tokenizer):
    found = {tokenizer.token_id(marker) for marker in MARKERS} | {tokenizer.pad_id, UNKNOWN}
    assert len(found) == len(MARKERS) + 2


@pytest.mark.parametrize("piece", ["<banana>", "no such piece"])
def test_what_is_no_token_has_no_id(tokenizer, piece):
    with pytest.raises(KeyError, match=piece):
        tokenizer.token_id(piece)


@settings(max_examples=150, deadline=None)
@given(segments=st.lists(st.one_of(texts, st.sampled_from((*MARKERS, *TEXTS)), texts.map(lambda t: f"<search>{t}"))))
def test_decode_inverts_encode(tokenizer, segments):
    encoded = tokenizer.encode(segments)
    assert tokenizer.decode(encoded) == segments
    assert all(0 <= i < tokenizer.vocab_size and i != UNKNOWN for row in encoded for i in row)


@pytest.mark.parametrize(
    "text",
    [
        "Łódź é ß",
        "日本 😀 👩‍👩‍👧",
        "\x00\x07 \r\n\t",
        "  two  spaces ",
        " ",
        "",
        "<unk><pad><s>",
        "<0x41>",
        "ﬁ① e\u0301",
    ],
)
def test_nothing_is_normalised_away(tokenizer, text):
    encoded = tokenizer.encode([text])
    assert tokenizer.decode(encoded) == [text]
    assert tokenizer.pad_id not in encoded[0]


def test_unseen_words_are_spelled(tokenizer):
    known, unseen = tokenizer.encode(["Torvan", "Zyxquogh"])
    assert len(known) < len("Torvan")
    assert UNKNOWN not in unseen
    assert len(unseen) > 1
    assert tokenizer.decode([unseen]) == ["Zyxquogh"]


def test_a_states_ids_are_a_prefix_of_every_later_states_ids(tokenizer):
    turns = (
        Turn(Search("Torvan birthplace"), (Document("1", "Torvan", "born in Bexlis <"), Document("2", "", " "))),
        Turn(Malformed("empty")),
        Turn(Search("Bexlis mayor", "birthplace Bexlis")),
    )
    earlier: list[int] = []
    for number in range(len(turns) + 1):
        later = ids(tokenizer, render(State("Who is the mayor?", turns[:number]), 99))
        assert later[: len(earlier)] == earlier
        assert len(later) > len(earlier)
        earlier = later
    assert ids(tokenizer, render(State("Who is the mayor?", turns), 4)) == [*earlier, tokenizer.token_id(FINISH)]


@settings(max_examples=40, deadline=None)
@given(first=st.lists(texts, max_size=4), rest=st.lists(texts, max_size=4))
def test_segments_are_encoded_on_their_own(tokenizer, first, rest):
    assert tokenizer.encode([*first, *rest]) == [*tokenizer.encode(first), *tokenizer.encode(rest)]


def test_decode_drops_ids_outside_the_vocabulary(tokenizer):
    good = tokenizer.encode(["Torvan"])[0]
    bad = [-1, tokenizer.vocab_size, 10**6]
    assert tokenizer.decode([[*bad[:2], *good, bad[2]], bad, []]) == ["Torvan", "", ""]


def test_decode_takes_arrays(tokenizer):
    rows = np.array(tokenizer.encode(["Torvan"]) * 2, np.int32)
    assert tokenizer.decode(rows) == ["Torvan", "Torvan"]
    assert tokenizer.decode(list(rows)) == ["Torvan", "Torvan"]


def test_padding_decodes_to_nothing(tokenizer):
    good = tokenizer.encode(["Torvan"])[0]
    assert tokenizer.decode([[tokenizer.pad_id, *good, tokenizer.pad_id]]) == ["Torvan"]


def test_training_is_deterministic_and_bounded(tokenizer):
    assert SentencePieceTokenizer.train(TEXTS, 420).model == tokenizer.model
    assert tokenizer.vocab_size <= 420
    assert SentencePieceTokenizer.train(TEXTS, 100_000).vocab_size < 1000, "a small corpus gives fewer pieces"


def test_a_saved_model_loads_as_the_same(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(tokenizer.model)
    loaded = SentencePieceTokenizer.load(path)
    assert loaded.vocab_size == tokenizer.vocab_size
    assert loaded.encode(TEXTS) == tokenizer.encode(TEXTS)


@pytest.mark.parametrize("content", [None, b"", b"no model", b"\x00" * 64, "cut"])
def test_an_unreadable_model_is_named(tokenizer, tmp_path, content):
    path = tmp_path / "tokenizer.model"
    if content is not None:
        path.write_bytes(tokenizer.model[: len(tokenizer.model) // 2] if content == "cut" else content)
    with pytest.raises(InputError, match=r"cannot read the tokenizer .*tokenizer\.model.*Give a SentencePiece model"):
        SentencePieceTokenizer.load(path)


def test_a_folder_is_no_model(tmp_path):
    with pytest.raises(InputError, match="cannot read the tokenizer"):
        SentencePieceTokenizer.load(tmp_path)
