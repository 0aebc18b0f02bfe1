"""The sizing formulas, held to the real sizes of small files and indexes within 15 %."""

import json
import subprocess
import sys
import tracemalloc
from pathlib import Path

import faiss
import numpy as np
import pytest

from eval import sizing
from eval.sizing import Config, Shape, like_wikipedia
from jraggym.data.corpora import write_chunks
from jraggym.retrieval.bm25 import Bm25Index
from jraggym.retrieval.corpus import Corpus, words
from jraggym.types import Document

ROOT = Path(__file__).resolve().parents[1]
WITHIN = 0.15
LEXICON = [f"{stem}{end}" for stem in "arn bel cor dun esk fal gor hul ira jun".split() for end in range(700)]


def near(real):
    return pytest.approx(real, rel=WITHIN)


def documents(count):
    rng = np.random.default_rng(0)
    drawn = rng.zipf(1.3, size=(count, 100)) % len(LEXICON)
    for i, row in enumerate(drawn):
        yield Document(f"Some town {i % 97}#{i}", f"Some town {i % 97}", " ".join(LEXICON[word] for word in row))


def shape_of(corpus, dim=64):
    texts = [set(words(text)) for text in corpus.texts()]
    sizes = [sum(len(getattr(document, name)) for document in corpus.documents) for name in ("text", "title")]
    n, vocabulary = len(corpus), len(set().union(*texts))
    return Shape(n, dim, sizes[0] / n, sizes[1] / n, sum(map(len, texts)) / n, vocabulary)


def traced(make):
    """What is made, and the bytes that Python and numpy hold for it."""
    tracemalloc.start()
    made = make()
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return made, held


def test_texts(tmp_path):
    corpus, held = traced(lambda: Corpus.from_documents(documents(2_000)))
    assert sizing.corpus_in_memory(shape_of(corpus)) == near(held)
    lines = [json.dumps({"title": document.title, "text": document.text}) for document in corpus.documents]
    (tmp_path / "dump.jsonl").write_text("\n".join(lines))
    path = write_chunks([tmp_path / "dump.jsonl"], tmp_path / "corpus.jsonl")
    assert sizing.texts_on_disk(shape_of(Corpus.from_jsonl(path))) == near(path.stat().st_size)


def test_vectors(tmp_path):
    np.save(tmp_path / "vectors.npy", np.zeros((500, 64), np.float32))
    shape = Shape(500, 64, 0, 0, 0, 0)
    assert sizing.vectors(shape) == near((tmp_path / "vectors.npy").stat().st_size)
    assert sizing.vectors(shape, 2) == 2 * 500 * 64


def test_bm25():
    corpus = Corpus.from_documents(documents(2_000))
    Bm25Index(["warm up"])  # imports count as well
    _, held = traced(lambda: Bm25Index(corpus.texts()))
    assert sizing.bm25(shape_of(corpus)) == near(held)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the resident memory as Linux tells it")
def test_codes():
    """By the growth from the second tree on, as the first brings tables and threads that all share."""
    script = """
import ctypes, numpy as np
from jraggym.retrieval import dense
def held():
    ctypes.CDLL(None).malloc_trim(0)
    return 1024 * int(next(l for l in open("/proc/self/status") if l.startswith("RssAnon")).split()[1])
vectors = np.random.default_rng(0).normal(size=(10_000, 256)).astype(np.float32)
trees = [dense._build(vectors, "dot_product")]
before = held()
trees += [dense._build(vectors, "dot_product") for _ in range(3)]
print(held() - before)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert sizing.codes(Shape(30_000, 256, 0, 0, 0, 0), chunk=10_000) == near(int(done.stdout))


def test_indexes_of_milvus():
    """Milvus searches by faiss's: SCANN by the fast scan of four-bit codes, HNSW by its own."""
    n, dim, clusters = 12_000, 64, 64
    vectors = np.random.default_rng(0).normal(size=(n, dim)).astype(np.float32)
    metric = faiss.METRIC_INNER_PRODUCT
    fast = faiss.IndexIVFPQFastScan(faiss.IndexFlatIP(dim), dim, clusters, dim // 2, 4, metric)
    fast.train(vectors)
    fast.add(vectors)
    shape = Shape(n, dim, 0, 0, 0, 0)
    assert sizing.scann(shape, clusters, raw=False) == near(len(faiss.serialize_index(fast)))
    assert sizing.scann(shape, clusters) == sizing.scann(shape, clusters, raw=False) + vectors.nbytes
    graph = faiss.IndexHNSWFlat(dim, sizing.NEIGHBOURS, metric)
    graph.hnsw.efConstruction = 16  # the size does not depend on it
    graph.add(vectors[:4_000])
    assert sizing.hnsw(Shape(4_000, dim, 0, 0, 0, 0)) == near(len(faiss.serialize_index(graph)))


def test_documented_sizes_by_hand():
    one = Shape(1_000, 768, 0, 0, 0, 0)
    assert sizing.diskann_on_disk(one) == 1_000 * 4_096  # 3,072 + 4 + 224 bytes fit once
    assert sizing.diskann_on_disk(Shape(1_000, 384, 0, 0, 0, 0)) == 1_000 * 2_048
    assert sizing.diskann_on_disk(Shape(1_000, 1_536, 0, 0, 0, 0)) == 1_000 * 8_192
    assert sizing.diskann_in_memory(one) == pytest.approx(0.225 * 1_000 * 3_072)
    ways = [sizing.Way(lambda shape, size=size: size, lambda shape: 0) for size in (1, 80e9, 80.1e9, 800e9)]
    assert [way.hosts(one, 100) for way in ways] == [1, 1, 2, 10]
    postings = Shape(100_000_000, 8, 0, 0, 70, 0)
    assert sizing.WAYS["this process: BM25 and ScaNN"].hosts(postings, 10**6) == 4  # 7e9 postings, 2.1e9 a host


def test_the_table_grows_with_the_corpus(capsys):
    lines = sizing.table(Config()).splitlines()
    assert lines[0] == "| GB, 100 words and 768 numbers a passage | 21 M passages | 1,000 M passages |"
    rows = {cells[1].strip(): cells[2:-1] for cells in (line.split("|") for line in lines if line)}
    assert rows["vectors, f32"] == [" 64.5 ", " 3,072.0 "]
    assert rows["vectors, bf16"] == [" 32.3 ", " 1,536.0 "]
    assert set(sizing.PARTS) | set(sizing.WAYS) < set(rows)
    small, large = like_wikipedia(10**6), like_wikipedia(10**7)
    assert 1 < large.vocabulary / small.vocabulary < 10
    for way in sizing.WAYS.values():
        assert way.memory(small) < way.memory(large)
        assert way.disk(small) < way.disk(large)
