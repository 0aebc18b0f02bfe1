"""Corpus, BM25, TF-IDF encoder, dense index, fusion, the retriever and its control."""

import json
import math
import subprocess
import sys
import threading
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend.core import Primitive
from threadpoolctl import threadpool_limits

from eval.retrieval import agreement, recall
from jraggym.errors import InputError, exit_on_input_error
from jraggym.retrieval import dense
from jraggym.retrieval.bm25 import Bm25Index
from jraggym.retrieval.corpus import Corpus, words
from jraggym.retrieval.dense import DenseIndex
from jraggym.retrieval.encoder import TfidfEncoder, embed
from jraggym.retrieval.fusion import reciprocal_rank_fusion
from jraggym.retrieval.hybrid import BrokenRetriever, HybridRetriever
from jraggym.types import Document, Example

ROOT = Path(__file__).resolve().parents[1]
HOTPOT = ROOT.parent / "shared" / "data" / "hotpotqa"
TEXTS = [
    "The river Tarvan rises in the hills of Morn and flows to the sea.",
    "Morn is a hill town; its mayor is Ada Lindqvist.",
    "Ada Lindqvist was born in Port Selby and wrote three novels.",
    "Port Selby lies on the sea and has a harbour, a harbour museum and a fish market.",
    "The fish market of Port Selby opens at dawn.",
    "A novel is a long work of fiction.",
    "Hills and rivers shape the weather of the coast.",
]
CORPUS = Corpus.from_documents(Document(f"d{i}", f"Title {i}", text) for i, text in enumerate(TEXTS))


def unit_rows(rng, n, d):
    x = rng.normal(size=(n, d)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def clustered(n, d, clusters=100, noise=1.0, seed=0):
    rng = np.random.default_rng(seed)
    x = unit_rows(rng, clusters, d)[rng.integers(clusters, size=n)] + noise * rng.normal(size=(n, d)) / math.sqrt(d)
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def no_jax(monkeypatch):
    """Makes every jax primitive fail, as a callback would dead-lock on it."""

    def refuse(*args, **kwargs):
        raise AssertionError("jax was called on the host side")

    def arm():
        monkeypatch.setattr(Primitive, "bind", refuse)
        with pytest.raises(AssertionError, match="jax was called"):
            jax.lax.top_k(np.zeros(5), 1)

    return arm


# ---------------------------------------------------------------- corpus


def test_corpus_positions_and_texts():
    assert len(CORPUS) == 7
    assert CORPUS[2].id == "d2"
    assert CORPUS.position("d2") == 2
    assert "d2" in CORPUS
    assert "x" not in CORPUS
    assert CORPUS.texts()[5] == "Title 5. A novel is a long work of fiction."
    with pytest.raises(InputError, match="no such document in the corpus; got 'x'"):
        CORPUS.position("x")
    with pytest.raises(AttributeError):
        setattr(CORPUS, "documents", ())  # noqa: B010


def test_jsonl_default_ids_are_unique_and_leave_written_ids_alone(tmp_path):
    path = tmp_path / "c.jsonl"
    rows = [
        {"title": "Paris", "text": "a"},
        {"title": "Paris", "text": "b"},
        {"id": "Paris (2)", "title": "Paris", "text": "c"},
        {"title": "Ünë\u2028", "text": "d\u2028e"},
    ]
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n", encoding="utf-8")
    assert [(d.id, d.text) for d in Corpus.from_jsonl(path).documents] == [
        ("Paris", "a"),
        ("Paris (3)", "b"),
        ("Paris (2)", "c"),
        ("Ünë\u2028", "d\u2028e"),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "c.jsonl: the corpus is empty"),
        ("not json", "c.jsonl, line 1 is not JSON"),
        ('{"title": "a", "text": "b"}\n[1]', "c.jsonl, line 2 is no JSON object; got list"),
        ('{"title": "a"}', "c.jsonl, line 1: missing field; got text"),
        ('{"title": "a", "text": "b", "body": "c"}', "c.jsonl, line 1: unknown field; got body"),
        ('{"title": "a", "text": 3}', "c.jsonl, line 1: field is no text; got text"),
        (
            '{"id": "x", "title": "a", "text": "b"}\n{"id": "x", "title": "c", "text": "d"}',
            "c.jsonl, line 2: duplicate document id; got 'x'",
        ),
    ],
)
def test_a_bad_corpus_file_is_named(tmp_path, content, message):
    path = tmp_path / "c.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        Corpus.from_jsonl(path)


def test_bad_documents_are_named(tmp_path):
    with pytest.raises(InputError, match=r"cannot read .*absent"):
        Corpus.from_jsonl(tmp_path / "absent.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"title": "\xe9", "text": ""}')
    with pytest.raises(InputError, match=r"cannot read .*latin"):
        Corpus.from_jsonl(tmp_path / "latin.jsonl")
    with pytest.raises(InputError, match="empty"):
        Corpus.from_documents([])
    with pytest.raises(InputError, match="duplicate document id; got 'd0'"):
        Corpus.from_documents([CORPUS[0], CORPUS[0]])


# ---------------------------------------------------------------- BM25


def naive_bm25(texts, query, k1=1.2, b=0.75):
    counts = [Counter(words(text)) for text in texts]
    lengths = [sum(c.values()) for c in counts]
    mean = sum(lengths) / len(lengths)
    scores = []
    for count, length in zip(counts, lengths, strict=True):
        score = 0.0
        for word in words(query):
            df = sum(word in c for c in counts)
            idf = math.log(1 + (len(texts) - df + 0.5) / (df + 0.5))
            tf = count[word]
            score += idf * tf / (tf + k1 * (1 - b + b * length / mean)) if tf else 0.0
        scores.append(score)
    order = sorted(range(len(texts)), key=lambda i: (-scores[i], i))
    return [i for i in order if scores[i] > 0]


QUERIES = ["mayor of Morn", "harbour, HARBOUR! museum", "where was the author Ada born?", "zzz unknown", "", "sea"]


@pytest.mark.parametrize("k", [1, 3, 7, 20])
def test_bm25_ranks_like_the_formula(k):
    found = Bm25Index(TEXTS).search(QUERIES, k)
    assert found.dtype == np.int32
    assert found.shape == (len(QUERIES), k)
    for row, query in zip(found, QUERIES, strict=True):
        expected = naive_bm25(TEXTS, query)[:k]
        assert row.tolist() == expected + [-1] * (k - len(expected)), query


@pytest.mark.parametrize("k", [1, 4, 5, 6, 12])
def test_bm25_breaks_ties_by_position(k):
    texts = ["a b", "c", "a b", "a a", "c d", "a b", "a b"]
    expected = [*naive_bm25(texts, "a"), *[-1] * 12][:k]
    assert Bm25Index(texts).search(["a"], k)[0].tolist() == expected


def test_bm25_search_calls_no_jax(no_jax):
    index = Bm25Index(TEXTS)
    no_jax()
    assert index.search(["sea"], 2)[0, 0] >= 0


def test_bm25_without_words_is_refused():
    with pytest.raises(InputError, match="no word"):
        Bm25Index(["...", ""])


# ---------------------------------------------------------------- TF-IDF encoder


def test_tfidf_equals_the_sklearn_pipeline():
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.preprocessing import normalize

    rng = np.random.default_rng(0)
    texts = [" ".join(f"W{int(w)}" for w in rng.zipf(1.4, size=30) if w < 500) for _ in range(200)]
    encoder = TfidfEncoder.fit(texts, dim=32, seed=3)
    tfidf = TfidfVectorizer(token_pattern=r"\w+", dtype=np.float32)
    svd = TruncatedSVD(32, random_state=3).fit(tfidf.fit_transform(texts))
    probes = [*texts[:40], "w1 w1 w1 unheard-of w7", "w2 w3"]
    expected = normalize(svd.transform(tfidf.transform(probes)))
    got = embed(encoder.document, probes, batch=16)
    assert np.abs(got - expected).max() < 1e-5
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, atol=1e-5)


def test_tfidf_is_the_same_for_any_number_of_threads():
    rng = np.random.default_rng(0)
    texts = [" ".join(f"W{int(w)}" for w in rng.zipf(1.2, size=60) if w < 5_000) for _ in range(3_000)]
    tables = []
    for threads in (1, 2):
        with threadpool_limits(threads, user_api="blas"):
            tables.append(np.asarray(TfidfEncoder.fit(texts, dim=64).query.params))
    np.testing.assert_array_equal(*tables)


def test_tfidf_tokenizes_to_a_static_shape_and_drops_unknown_words():
    tower = TfidfEncoder.fit(TEXTS, dim=100).query
    assert tower.dim == len(TEXTS)  # no more directions than texts
    ids, mask = tower.tokenize(["the zzz sea", "zzz", "sea " * 100])
    assert ids.shape == mask.shape == (3, tower.max_tokens) == (3, 32)
    assert ids.dtype == np.int32
    assert mask.dtype == bool
    assert mask.sum(1).tolist() == [2, 0, tower.max_tokens]
    assert TfidfEncoder.fit(TEXTS, query_tokens=5).query.tokenize(["sea"])[0].shape == (1, 5)
    vectors = np.asarray(tower.apply(tower.params, jnp.asarray(ids), jnp.asarray(mask)))
    assert not vectors[1].any()
    assert np.isfinite(vectors).all()


def test_embedding_does_not_depend_on_batch_or_order():
    tower = TfidfEncoder.fit(TEXTS, dim=6).document
    seen: list[int] = []
    whole = embed(tower, TEXTS, batch=4, progress=seen.append)
    assert seen == [4, 7]
    np.testing.assert_allclose(embed(tower, TEXTS[::-1], batch=3)[::-1], whole, atol=1e-6)
    np.testing.assert_array_equal(embed(TfidfEncoder.fit(TEXTS, dim=6).document, TEXTS, batch=4), whole)
    assert embed(tower, [], batch=4).shape == (0, 6)


def test_tfidf_without_words_is_refused():
    with pytest.raises(InputError, match="no word"):
        TfidfEncoder.fit(["..."])


# ---------------------------------------------------------------- dense index


def test_small_index_is_exact_and_pads():
    rng = np.random.default_rng(1)
    vectors, queries = unit_rows(rng, 50, 16), unit_rows(rng, 9, 16)
    exact = np.argsort(-(queries @ vectors.T), axis=1)
    np.testing.assert_array_equal(DenseIndex(vectors).search(queries, 10), exact[:, :10])
    found = DenseIndex(vectors).search(queries, 60)
    np.testing.assert_array_equal(found[:, :50], exact)
    assert (found[:, 50:] == -1).all()
    assert found.dtype == np.int32


def test_equal_products_go_by_position_and_zero_finds_nothing():
    vectors = np.repeat(np.eye(3, dtype=np.float32), 4, axis=0)
    found = DenseIndex(vectors).search(np.array([[0, 1, 0], [0, 0, 0]], np.float32), 4)
    assert found.tolist() == [[4, 5, 6, 7], [-1] * 4]
    assert DenseIndex(vectors).search(np.zeros((0, 3), np.float32), 4).shape == (0, 4)


def test_tree_agrees_with_exact_search():
    vectors = clustered(dense.TREE_FROM + 200, 64)
    corpus, queries = vectors[:-200], vectors[-200:]
    assert agreement(corpus, queries, 32) >= 0.98
    index = DenseIndex(corpus)
    np.testing.assert_array_equal(index.search(queries[5:6], 32), index.search(queries, 32)[5:6])


@pytest.mark.parametrize("n", [2_000, 10_000])  # an exact search, and a tree
def test_what_a_query_finds_does_not_depend_on_the_others(n):
    index, queries = DenseIndex(clustered(n, 64)), clustered(1_500, 64, seed=1)
    positions, distances = index.nearest(queries, 32)
    for size in (1, 7):
        parts = [index.nearest(queries[at : at + size], 32) for at in range(0, len(queries), size)]
        for whole, part in zip((positions, distances), zip(*parts, strict=True), strict=True):
            np.testing.assert_array_equal(whole, np.concatenate(part))


def test_every_process_builds_the_same_tree(tmp_path):
    # Noise without clusters: another tree finds other neighbours. A second process, since the seed of ScaNN's
    # default start changes with the process alone.
    vectors = unit_rows(np.random.default_rng(0), dense.TREE_FROM + 50, 16)
    np.save(tmp_path / "vectors.npy", vectors)
    script = (
        "import sys, numpy as np; from jraggym.retrieval.dense import DenseIndex; v = np.load(sys.argv[1]);"
        "np.save(sys.argv[2], DenseIndex(v[:-50]).search(v[-50:], 32))"
    )
    files = [str(tmp_path / name) for name in ("vectors.npy", "found.npy")]
    subprocess.run([sys.executable, "-c", script, *files], check=True, timeout=120, cwd=ROOT, capture_output=True)
    found = DenseIndex(vectors[:-50]).search(vectors[-50:], 32)
    np.testing.assert_array_equal(np.load(tmp_path / "found.npy"), found)
    exact = np.argsort(-(vectors[-50:] @ vectors[:-50].T), axis=1)[:, :32]
    assert (found != exact).any(), "the search is exact here, so the test sees no tree"


def test_bad_vectors_are_refused():
    with pytest.raises(InputError, match=r"vectors \[n, D\]; got \(0, 4\)"):
        DenseIndex(np.zeros((0, 4), np.float32))
    with pytest.raises(InputError, match="not all finite"):
        DenseIndex(np.full((2, 2), np.nan, np.float32))
    with pytest.raises(InputError, match=r"queries must be \[Q, 2\]; got \(1, 3\)"):
        DenseIndex(np.eye(2, dtype=np.float32)).search(np.ones((1, 3), np.float32), 1)


# ---------------------------------------------------------------- fusion


def test_fusion_worked_by_hand():
    # 7: 1/61 + 1/63; 3: 1/62 + 1/61; 9: 1/62 (second list); 5: 1/63. Second query: 4 and 2 tie at 1/61.
    first = np.array([[7, 3, 5], [4, -1, -1]])
    second = np.array([[3, 9, 7], [2, -1, -1]])
    assert reciprocal_rank_fusion([first, second], 5).tolist() == [[3, 7, 9, 5, -1], [2, 4, -1, -1, -1]]
    assert reciprocal_rank_fusion([first, second], 1).tolist() == [[3], [2]]


def naive_fusion(rankings, k, constant):
    rows = []
    for q in range(len(rankings[0])):
        scores: dict[int, Fraction] = {}
        for ranking in rankings:
            for rank, document in enumerate(ranking[q].tolist(), start=1):
                if document >= 0:
                    scores[document] = scores.get(document, 0) + Fraction(1, constant + rank)
        rows.append(([*sorted(scores, key=lambda d: (-scores[d], d)), *[-1] * k])[:k])
    return rows


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(0, 6), st.integers(1, 12))
def test_fusion_equals_the_naive_sum(seed, lists, queries, k):
    rng = np.random.default_rng(seed)
    rankings = []
    for _ in range(lists):
        depth = int(rng.integers(0, 9))
        ranking = np.array([rng.permutation(12)[:depth] for _ in range(queries)], np.int32).reshape(queries, depth)
        rankings.append(np.where(rng.random(ranking.shape) < 0.2, -1, ranking))
    assert reciprocal_rank_fusion(rankings, k, 10).tolist() == naive_fusion(rankings, k, 10)


def test_fusion_ties_do_not_depend_on_the_order_of_summation():
    # Each of 0, 1, 2 has the ranks 1, 2 and 7 once; as floats, 1/67 + 1/61 + 1/62 is below 1/61 + 1/62 + 1/67.
    lists = [np.array([[a, b, -1, -1, -1, -1, c]]) for a, b, c in ((1, 2, 0), (0, 1, 2), (2, 0, 1))]
    for order in ([0, 1, 2], [2, 1, 0], [1, 0, 2], [1, 2, 0]):
        assert reciprocal_rank_fusion([lists[i] for i in order], 3).tolist() == [[0, 1, 2]]


# ---------------------------------------------------------------- retriever

ENCODER = TfidfEncoder.fit(CORPUS.texts(), dim=7)
MODES: dict[str, dict[str, Any]] = {
    "bm25": {},
    "dense": {"encoder": ENCODER, "lexical": False},
    "fused": {"encoder": ENCODER},
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_finds_the_document(mode):
    retriever = HybridRetriever(CORPUS, **MODES[mode])
    found = retriever(["mayor of Morn", "", "harbour museum", "mayor of Morn"])
    assert [documents[0].id if documents else None for documents in found] == ["d1", None, "d3", "d1"]
    one = 1 if mode == "bm25" else 2  # one text alone holds a word of "harbour museum"
    assert [len(documents) for documents in found] == [2, 0, one, 2]
    assert len(retriever(["the sea"], k=3)[0]) == 3
    assert retriever(["zzz"]) == [()]  # no known word: nothing, not a random document
    assert retriever([" ", ""]) == [(), ()]


@pytest.mark.parametrize("mode", MODES)
def test_search_inside_a_callback_under_jit(mode):
    retriever = HybridRetriever(CORPUS, **MODES[mode])
    queries = ["mayor of Morn", "harbour museum"]
    found = []

    def host(vectors):
        found.append(retriever.search(queries, vectors))
        return np.int32(0)

    @jax.jit
    def step(params, ids, mask):
        vectors = retriever.encode(params, ids, mask)
        return jax.pure_callback(host, jax.ShapeDtypeStruct((), np.int32), vectors)

    worker = threading.Thread(target=lambda: step(retriever.params, *retriever.tokenize(queries)).block_until_ready())
    worker.daemon = True
    worker.start()
    worker.join(60)
    assert not worker.is_alive(), "search dead-locks inside a callback"
    assert found[0] == retriever(queries)


@pytest.mark.parametrize("mode", MODES)
def test_tokenize_and_search_call_no_jax(mode, no_jax):
    retriever = HybridRetriever(CORPUS, **MODES[mode])
    vectors = np.asarray(retriever.encode(retriever.params, *map(jnp.asarray, retriever.tokenize(["sea"]))))
    assert vectors.shape == (1, retriever.dim)
    no_jax()
    assert retriever.tokenize(["sea"])[0].shape == (1, retriever.query_tokens)
    assert retriever.search(["sea"], vectors)[0]
    assert BrokenRetriever(retriever, 0).search(["sea"], vectors)[0]


@pytest.mark.parametrize("mode", MODES)
def test_one_batch_shape_compiles_once(mode):
    retriever, traces = HybridRetriever(CORPUS, **MODES[mode]), []

    @jax.jit
    def encode(params, ids, mask):
        traces.append(ids.shape)
        return retriever.encode(params, ids, mask)

    for queries in (["sea", "Morn"], ["a much longer query about the river", ""], ["x", "y"]):
        encode(retriever.params, *retriever.tokenize(queries))
    assert traces == [(2, retriever.query_tokens)]


def test_a_repeated_query_is_searched_once(monkeypatch):
    retriever = HybridRetriever(CORPUS, ENCODER)
    seen: list[str] = []
    search = Bm25Index.search

    def spy(index, queries, k):
        seen.extend(queries)
        return search(index, queries, k)

    monkeypatch.setattr(Bm25Index, "search", spy)
    retriever(["sea", "Morn", "sea", "", "sea"])
    assert seen == ["sea", "Morn"]


def test_given_vectors_replace_embedding():
    vectors = embed(ENCODER.document, CORPUS.documents)
    assert HybridRetriever(CORPUS, ENCODER, vectors=vectors)(["sea"]) == HybridRetriever(CORPUS, ENCODER)(["sea"])
    with pytest.raises(InputError, match="one vector per document is needed; got 3"):
        HybridRetriever(CORPUS, ENCODER, vectors=vectors[:3])
    with pytest.raises(InputError, match="needs an encoder or BM25"):
        HybridRetriever(CORPUS, lexical=False)
    with pytest.raises(InputError, match="k=0"):
        HybridRetriever(CORPUS, k=0)


def test_the_control_is_a_function_of_seed_and_query():
    broken = BrokenRetriever(HybridRetriever(CORPUS, ENCODER), seed=1)
    queries = [f"q{i}" for i in range(30)]
    found = broken(queries, k=3)
    assert found == broken(queries[::-1], k=3)[::-1]
    assert found != BrokenRetriever(HybridRetriever(CORPUS), seed=2)(queries, k=3)
    assert all(len({d.id for d in documents}) == 3 for documents in found)
    assert {d.id for documents in found for d in documents} == {d.id for d in CORPUS.documents}
    assert broken(["", "sea"], k=99)[0] == ()
    assert len(broken(["sea"], k=99)[0]) == len(CORPUS)
    np.testing.assert_array_equal(broken.tokenize(["sea"])[0], ENCODER.query.tokenize(["sea"])[0])


# ---------------------------------------------------------------- entry


def test_recall_counts_some_and_all_gold():
    examples = [Example("a", "q", ("x",), support=("d0", "d1")), Example("b", "q", ("x",), support=("d2",))]
    found = [(CORPUS[0], CORPUS[3], CORPUS[1]), (CORPUS[4], CORPUS[2])]
    assert recall(found, examples, 1) == (0.5, 0.0)
    assert recall(found, examples, 2) == (1.0, 0.5)
    assert recall(found, examples, 3) == (1.0, 1.0)


def test_input_errors_become_one_line_and_exit_code_2(capsys):
    with pytest.raises(SystemExit) as exit, exit_on_input_error():
        raise InputError("a thing is wrong", got="x", remedy="Do y.")
    assert exit.value.code == 2
    assert capsys.readouterr().err == "error: a thing is wrong; got x. Do y.\n"
    with pytest.raises(ZeroDivisionError), exit_on_input_error():
        _ = 1 / 0


def test_the_entry_names_a_missing_folder(tmp_path):
    command = [sys.executable, "-m", "eval.retrieval", "--data-dir", str(tmp_path), "--encoder", "tfidf"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: cannot read")
    assert done.stderr.count("\n") == 1


@pytest.mark.skipif(not HOTPOT.is_dir(), reason=f"needs the HotpotQA extract in {HOTPOT}")
def test_bm25_recall_on_hotpotqa():
    from jraggym.data.hotpotqa import read_pooled

    questions = read_pooled(HOTPOT)
    retriever = HybridRetriever(questions.corpus, k=20)
    found = retriever([example.question for example in questions.examples])
    assert recall(found, questions.examples, 5)[1] >= 0.52
    assert recall(found, questions.examples, 20)[1] >= 0.85
