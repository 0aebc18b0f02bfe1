"""Our tokenizer through AutoTokenizer: the same ids and the same texts, for anything that can be written."""

import json
import random

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from jraggym.data.synthhop import make_world
from jraggym.errors import InputError
from jraggym.text.actions import format_action
from jraggym.text.batching import Codec
from jraggym.text.huggingface import HuggingFaceTokenizer
from jraggym.text.rendering import MARKERS, render
from jraggym.text.tokenizer import SentencePieceTokenizer
from jraggym.text.tokenizer_export import huggingface_files
from jraggym.types import Answer, Document, Malformed, Search, State, Turn

ODD = (
    "<sear",
    "ch>",
    "<<search>>",
    "<search",
    "search>",
    "</",
    "<pad>",
    "<unk>",
    "<s>",
    "<0x41>",
    "▁",
    "\n",
    "\t",
    "\r",
)
ODD += ("\x00", "\x7f", "\u200b", "\ufeff", "😀", "👩‍👩‍👧", "日本", "e\u0301", "ﬁ①", "\u00a0", "\U0010ffff", "İ", "ſ")

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
mixed = st.lists(st.one_of(texts, st.sampled_from((*MARKERS, *ODD, " ", "  ", "Torvan"))), max_size=8).map("".join)


@pytest.fixture(scope="module")
def world():
    return make_world("development", 0, questions=60)


@pytest.fixture(scope="module")
def tokenizer(world):
    texts = [f"{document.title} | {document.text}" for document in world.documents[:300]]
    return SentencePieceTokenizer.train([*texts, *(e.question for e in world.examples)], 1000)


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("exported") / "new" / "folder"
    huggingface_files(tokenizer, path)
    return path


@pytest.fixture(scope="module")
def exported(folder):
    return AutoTokenizer.from_pretrained(folder)


def same(ours, theirs, found):
    """Ids and texts of `found` by both."""
    ids = ours.encode(found)
    others = theirs(found, add_special_tokens=False)["input_ids"]
    assert [text for text, a, b in zip(found, ids, others, strict=True) if a != b] == []
    back = theirs.batch_decode(ids, skip_special_tokens=True)
    assert [text for text, a, b in zip(found, ours.decode(ids), back, strict=True) if a != b] == []


def states(world):
    """States of the embedded world with documents, thoughts, failures and forced finishes."""
    rng = random.Random(0)
    for number, example in enumerate(world.examples):
        turns = []
        for document in rng.sample(world.documents, 3):
            found = (document, Document("x", f"<search>{document.title}", "a <finish> b </search>"))[
                : rng.randint(0, 2)
            ]
            turns.append(Turn(Search(document.title, rng.choice(["", "first this"])), found))
        turns.insert(number % 3, Turn(Malformed("no action")))
        for count in range(len(turns) + 1):
            yield State(example.question, tuple(turns[:count]))


# ---------------------------------------------------------------- the same ids, the same texts


@settings(max_examples=300, deadline=None)
@given(found=st.lists(mixed, min_size=1, max_size=8))
def test_any_text(tokenizer, exported, found):
    same(tokenizer, exported, found)


def test_ten_thousand_texts(world, tokenizer, exported):
    rng, words = random.Random(0), " ".join(document.text for document in world.documents[:100]).split(" ")

    def part():
        kind = rng.randrange(5)
        if kind == 4:
            span = rng.choice([(0x20, 0x7F), (0, 0x800), (0x800, 0xD800), (0xE000, 0x10000), (0x10000, 0x110000)])
            return "".join(chr(rng.randrange(*span)) for _ in range(rng.randint(1, 6)))
        return [rng.choice(words), rng.choice(MARKERS), " " * rng.randint(1, 4), rng.choice(ODD)][kind]

    found = [rng.choice(["", " "]).join(part() for _ in range(rng.randint(0, 9))) for _ in range(12_000)]
    same(tokenizer, exported, found)


@pytest.mark.parametrize(("alphabet", "vocab"), [("ab", 420), ("abc", 600), ("a", 300), ("ab ", 500)])
def test_pieces_that_overlap_and_split_in_many_ways(tmp_path, alphabet, vocab):
    """Few letters make pieces that come about in several ways and overlap with themselves."""
    rng = random.Random(1)

    def text():
        return "".join(rng.choice(alphabet) for _ in range(rng.randint(0, 60)))

    tokenizer = SentencePieceTokenizer.train([text() for _ in range(300)], vocab)
    huggingface_files(tokenizer, tmp_path)
    same(tokenizer, AutoTokenizer.from_pretrained(tmp_path), [text() for _ in range(3000)])
    merges = [tuple(pair) for pair in json.loads((tmp_path / "tokenizer.json").read_text())["model"]["merges"]]
    if alphabet != "a":
        assert len({"".join(pair) for pair in merges}) < len(merges), "no piece comes about in two ways"


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3", "gemma2", "gemma3_text"])
def test_a_models_config_beside_it_changes_nothing(tokenizer, tmp_path, kind):
    huggingface_files(tokenizer, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    found = ["<question> Who is it?<search> the mayor</search>", "<pad> ", "  \n日本", *ODD]
    same(tokenizer, AutoTokenizer.from_pretrained(tmp_path), found)


def test_markers_are_text_and_padding_is_none(tokenizer, exported):
    for marker in MARKERS:
        ids = exported.encode(f"a{marker}b", add_special_tokens=False)
        assert ids.count(tokenizer.token_id(marker)) == 1
        assert exported.decode(ids, skip_special_tokens=True) == f"a{marker}b"
    assert exported.pad_token_id == tokenizer.pad_id
    assert len(exported) == tokenizer.vocab_size
    batch = exported(["<search> a</search>", "b"], padding=True)
    assert batch["input_ids"][1][0] == tokenizer.pad_id, "prompts are padded on the left"
    assert exported.batch_decode(batch["input_ids"], skip_special_tokens=True) == ["<search> a</search>", "b"]


def test_any_ids_decode_alike_but_for_broken_utf8(tokenizer, exported):
    first = tokenizer.token_id("<0x00>")
    rng, size = random.Random(0), tokenizer.vocab_size
    rows = [
        [rng.choice([rng.randrange(first + 128), rng.randrange(first + 256, size)]) for _ in range(9)]
        for _ in range(500)
    ]
    assert tokenizer.decode(rows) == exported.batch_decode(rows, skip_special_tokens=True)
    broken = [[first + 0xC3, first + 0x41]]  # a character that is cut off, and a letter
    assert tokenizer.decode(broken) == ["�A"]
    assert exported.batch_decode(broken) == ["��"]


# ---------------------------------------------------------------- prompts


def test_a_prompt_as_one_string_has_the_ids_of_its_segments(world, tokenizer, exported):
    codec = Codec(tokenizer, 5, 10**6)
    found = list(states(world))
    prompts = ["".join(render(state, 5)) for state in found]
    ids = exported(prompts, add_special_tokens=False)["input_ids"]
    assert ids == [codec.prompt(state) for state in found]
    actions = [format_action(Search("the mayor", "first")), format_action(Answer("Bexlis")), "<search", " no action"]
    for prompt, state in zip(prompts[:20], found, strict=False):
        whole = exported([prompt + action for action in actions[:2]], add_special_tokens=False)["input_ids"]
        assert whole == [codec.prompt(state) + action for action in codec.encode(actions[:2])]


@settings(max_examples=100, deadline=None)
@given(question=texts.filter(str.strip), query=texts, thought=texts, title=texts, text=texts)
def test_every_segment_begins_with_a_marker_and_so_segments_can_be_joined(
    tokenizer, exported, question, query, thought, title, text
):
    turns = (Turn(Search(query, thought), (Document("d", title, text),)), Turn(Malformed("x")), Turn(Search(query), ()))
    segments = render(State(question, turns), 4)
    assert all(segment.startswith(MARKERS) for segment in segments)
    apart = [i for ids in tokenizer.encode(segments) for i in ids]
    assert tokenizer.encode(["".join(segments)])[0] == apart
    assert exported.encode("".join(segments), add_special_tokens=False) == apart


def test_segments_without_a_marker_could_not_be_joined(tokenizer):
    """Why a malformed action is encoded on its own."""
    first, second = tokenizer.encode(["<question> Who is the", "re?"])
    assert tokenizer.encode(["<question> Who is there?"])[0] != first + second


def test_the_exported_tokenizer_does_the_work_of_ours(world, tokenizer, folder):
    theirs = HuggingFaceTokenizer.load(folder)
    ours, others = Codec(tokenizer, 5, 200), Codec(theirs, 5, 200)
    assert (theirs.vocab_size, theirs.pad_id, others.stops) == (tokenizer.vocab_size, tokenizer.pad_id, ours.stops)
    found = list(states(world))[:60]
    assert [others.prompt(state) for state in found] == [ours.prompt(state) for state in found]
    actions = ["<search> mayor</search>", "no action", "<think> a</think><answer> b</answer>", ""]
    assert others.encode(actions) == ours.encode(actions)
    assert others.decode(ours.encode(actions)) == actions
    with pytest.raises(InputError, match="has no chat template"):
        theirs.chat([{"role": "user", "content": "a"}])


# ---------------------------------------------------------------- what cannot be exported


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "unigram"},
        {"normalization_rule_name": "nmt_nfkc"},
        {"add_dummy_prefix": True},
        {"remove_extra_whitespaces": True},
        {"byte_fallback": False},
        {"user_defined_symbols": ["<other>"]},
        {"pad_id": -1, "unk_id": 0},
    ],
)
def test_other_models_are_refused(tmp_path, monkeypatch, world, options):
    train = sentencepiece.SentencePieceTrainer.train
    monkeypatch.setattr(sentencepiece.SentencePieceTrainer, "train", lambda **usual: train(**{**usual, **options}))
    tokenizer = SentencePieceTokenizer.train([document.text for document in world.documents[:50]], 400)
    with pytest.raises(
        InputError, match=r"cannot be exported; got (\[.*\] for \[.*\] of|no padding).*SentencePieceTokenizer\.train"
    ):
        huggingface_files(tokenizer, tmp_path)
    assert not list(tmp_path.iterdir())
