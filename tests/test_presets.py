"""The presets of RAG-Gym: their table, and retrievers of small random encoders against a fusion by hand."""

import numpy as np
import pytest
from bert_sample import write_bert

from jraggym.data.benchmarks import BENCHMARKS
from jraggym.errors import InputError
from jraggym.models.bert_encoder import SIDES, BertEncoder
from jraggym.models.encoders import family
from jraggym.retrieval.bm25 import Bm25Index
from jraggym.retrieval.corpus import Corpus
from jraggym.retrieval.encoder import embed
from jraggym.retrieval.presets import PRESETS, preset_of, preset_retriever
from jraggym.types import Document

WORDS = "the a of and in sea port who was born hill mor tar novel".split()
QUERIES = ["who was born in the port", "a novel of the sea", "hill and sea"]


@pytest.fixture(scope="module")
def corpus():
    rng = np.random.default_rng(0)
    texts = (" ".join(rng.choice(WORDS, size=8)) for _ in range(150))
    return Corpus.from_documents(Document(f"d{i}", f"t{i}", text) for i, text in enumerate(texts))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return [write_bert(tmp_path_factory.mktemp("plain") / side, seed, 24) for seed, side in enumerate(SIDES)]


def test_the_table_is_the_papers():
    """RAG-Gym's retrieval: BM25 with BGE for Wikipedia, with MedCPT for medicine; k 32, 100 candidates, constant 60."""
    assert {name: (preset.encoder, preset.documents) for name, preset in PRESETS.items()} == {
        "rrf_bge": ("BAAI/bge-base-en-v1.5", None),
        "rrf_2": ("ncbi/MedCPT-Query-Encoder", "ncbi/MedCPT-Article-Encoder"),
    }
    assert {(preset.k, preset.depth, preset.constant) for preset in PRESETS.values()} == {(32, 100, 60)}
    papers = {"hotpotqa": "rrf_bge", "twowiki": "rrf_bge", "bamboogle": "rrf_bge", "medqa": "rrf_2"}
    assert {name: preset_of(name) for name in papers} == papers


def test_every_benchmark_has_one_preset_and_every_preset_a_known_encoder():
    assert sorted(name for preset in PRESETS.values() for name in preset.benchmarks) == sorted(BENCHMARKS)
    for preset in PRESETS.values():
        assert family(preset.encoder).towers == (1 if preset.documents is None else 2)
        assert preset.documents is None or family(preset.documents) == family(preset.encoder)


def by_hand(corpus, encoder, preset):
    """The fused ranking from exact scores: 1 / (constant + rank) over both rankings of `depth`."""
    queries = np.asarray(encoder.query.apply(encoder.query.params, *encoder.query.tokenize(QUERIES)))
    dense = np.argsort(-(queries @ embed(encoder.document, corpus.documents).T), axis=1, kind="stable")
    lexical = Bm25Index(corpus.texts()).search(QUERIES, preset.depth)
    found = []
    for rankings in zip(lexical, dense[:, : preset.depth], strict=True):
        scores: dict[int, float] = {}
        for ranking in rankings:
            for rank, position in enumerate(ranking[ranking >= 0].tolist(), start=1):
                scores[position] = scores.get(position, 0.0) + 1 / (preset.constant + rank)
        best = sorted(scores, key=lambda position: (-round(scores[position], 12), position))[: preset.k]
        found.append([f"d{position}" for position in best])
    return found


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_preset_fuses_both_rankings(corpus, folders, name, tmp_path):
    preset = PRESETS[name]
    documents = folders[1] if preset.documents else None
    retriever = preset_retriever(name, corpus, folders[0], documents)
    found = [[document.id for document in row] for row in retriever(QUERIES)]
    encoder = BertEncoder.load(folders[0], preset.encoder, documents)
    assert found == by_hand(corpus, encoder, preset)
    assert {len(row) for row in found} == {32}
    kept = preset_retriever(name, corpus, folders[0], documents, vectors=tmp_path / "vectors")
    assert [[document.id for document in row] for row in kept(QUERIES)] == found
    assert len(list((tmp_path / "vectors").glob("*.npy"))) == 1


def test_what_is_unknown_is_named(corpus, folders):
    with pytest.raises(InputError, match=r"unknown preset; got 'rrf_4'. Use one of rrf_bge, rrf_2"):
        preset_retriever("rrf_4", corpus, folders[0])
    with pytest.raises(InputError, match=r"no preset for this benchmark; got 'trivia'. Known: hotpotqa, twowiki"):
        preset_of("trivia")
    with pytest.raises(InputError, match="this encoder has two towers"):
        preset_retriever("rrf_2", corpus, folders[0])
