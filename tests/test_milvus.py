"""The retriever on Milvus against embedded milvus-lite: what it finds, kills, outages, and collections of others."""

import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from toy_world import toy_codec, toy_examples, toy_retriever

pymilvus = pytest.importorskip("pymilvus", reason="needs pip install 'jraggym[milvus]'")
pytest.importorskip("milvus_lite", reason="needs pip install 'jraggym[milvus]'")

from milvus_lite.server_manager import server_manager_instance  # noqa: E402

from jraggym.chats.local import Local  # noqa: E402
from jraggym.data.synthhop import make_world  # noqa: E402
from jraggym.errors import InputError  # noqa: E402
from jraggym.models.critic import critic_specs  # noqa: E402
from jraggym.models.decoder import DecoderConfig, init, specs  # noqa: E402
from jraggym.recipes.qa import Qa, deciding, evaluated, open_retriever  # noqa: E402
from jraggym.retrieval import milvus_collection  # noqa: E402
from jraggym.retrieval.corpus import Corpus, written  # noqa: E402
from jraggym.retrieval.encoder import TfidfEncoder, embed  # noqa: E402
from jraggym.retrieval.hybrid import HybridRetriever  # noqa: E402
from jraggym.retrieval.milvus import MilvusRetriever  # noqa: E402
from jraggym.retrieval.milvus_collection import Collection, Milvus, built, corpus_digits, searched  # noqa: E402
from jraggym.retrieval.vectors import stored_vectors  # noqa: E402
from jraggym.rollout import Policy, Rollout, Rules  # noqa: E402
from jraggym.sampling import Sampling  # noqa: E402
from jraggym.types import Document  # noqa: E402
from jraggym.whole import write_whole  # noqa: E402

WORLD = make_world("test", seed=0, questions=40)
DOCUMENTS = WORLD.documents[:450]
CORPUS = Corpus.from_documents(DOCUMENTS)
ENCODER = TfidfEncoder.fit(CORPUS.texts(), dim=48)
QUERIES = [f"{example.question} {i}" for i, example in enumerate(WORLD.examples)]


class Killed(BaseException):
    pass


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(milvus_collection, "BATCH", 100)


@pytest.fixture
def place(tmp_path):
    """A collection of its own, whose embedded server ends with the test."""
    milvus = Milvus(str(tmp_path / "index.db"), "docs", index="FLAT")
    yield milvus
    server_manager_instance.release_server(milvus.uri)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A collection of all documents, which no test changes."""
    milvus = Milvus(str(tmp_path_factory.mktemp("milvus") / "index.db"), "docs", index="FLAT")
    Collection(milvus).make(ENCODER, DOCUMENTS, progress=lambda count: None)
    yield milvus
    server_manager_instance.release_server(milvus.uri)


def ids(found):
    return [[document.id for document in row] for row in found]


def shared(found, exact):
    return np.mean([len({*a} & {*b}) / len(b) for a, b in zip(ids(found), ids(exact), strict=True)])


# ---------------------------------------------------------------- what it finds


def test_vectors_find_what_our_exact_search_finds(whole):
    exact = HybridRetriever(CORPUS, ENCODER, k=10, lexical=False)
    found = MilvusRetriever(whole, ENCODER, k=10, lexical=False)(QUERIES)
    assert shared(found, exact(QUERIES)) >= 0.99  # equal similarities may come in another order
    assert {document for row in found for document in row} <= set(DOCUMENTS)  # titles and texts, not ids alone


@pytest.mark.parametrize("index", ["AUTOINDEX", "IVF_FLAT", "HNSW"])
def test_approximate_indexes_find_nearly_the_same(place, index):
    retriever = MilvusRetriever(replace(place, index=index), ENCODER, k=10, lexical=False, corpus=DOCUMENTS)
    assert retriever._collection.index()["index_type"] == index
    exact = HybridRetriever(CORPUS, ENCODER, k=10, lexical=False)(QUERIES)
    assert shared(retriever(QUERIES), exact) >= 0.9


def test_euclidean_encoders_have_their_metric(place):
    encoder = replace(ENCODER, similarity="euclidean")
    exact = HybridRetriever(CORPUS, encoder, k=10, lexical=False)(QUERIES)
    retriever = MilvusRetriever(place, encoder, k=10, lexical=False, corpus=DOCUMENTS)
    assert retriever._collection.index()["metric_type"] == "L2"
    assert shared(retriever(QUERIES), exact) >= 0.99


def test_both_rankings_are_fused_as_ours_are(whole):
    """Milvus's BM25 splits words and breaks ties in its own way, so not all agrees."""
    ours, theirs = HybridRetriever(CORPUS, ENCODER, k=10)(QUERIES), MilvusRetriever(whole, ENCODER, k=10)(QUERIES)
    assert shared(theirs, ours) >= 0.9
    dense = HybridRetriever(CORPUS, ENCODER, k=10, lexical=False)(QUERIES)
    assert shared(theirs, dense) < shared(theirs, ours)
    assert np.mean([a[0] == b[0] for a, b in zip(ids(ours), ids(theirs), strict=True)]) >= 0.9


def test_a_query_without_a_known_token_is_searched_by_words_alone(place):
    """The encoder was fitted on other texts and does not know the word, BM25 does."""
    documents = [*DOCUMENTS[:20], Document("odd", "Odd", "zyzzyva")]
    both = MilvusRetriever(place, ENCODER, corpus=documents)
    assert ids(both(["zyzzyva", QUERIES[0], "", "qqqq", "???"])[:1]) == [["odd"]]
    assert both(["", "qqqq", "???"]) == [(), (), ()]
    assert MilvusRetriever(place, ENCODER, lexical=False)(["zyzzyva"]) == [()]


def test_a_filter_leaves_out_what_does_not_match(whole):
    letter = DOCUMENTS[0].title[0]
    found = MilvusRetriever(replace(whole, filter=f'title like "{letter}%"'), ENCODER, k=8)(QUERIES)
    assert any(found)
    assert {document.title[0] for row in found for document in row} == {letter}
    assert {row[0].title[0] for row in MilvusRetriever(whole, ENCODER, k=8)(QUERIES)} != {letter}
    with pytest.raises(InputError, match=r"no filter: title like.*Write an expression over document"):
        MilvusRetriever(replace(whole, filter="title like"), ENCODER)


def test_many_queries_are_asked_in_several_requests_at_once(whole, monkeypatch):
    retriever, sizes, threads = MilvusRetriever(replace(whole, concurrency=4), ENCODER), [], set()
    ask = retriever._ask

    def spy(queries, vectors, k):
        sizes.append(len(queries))
        threads.add(threading.get_ident())
        return ask(queries, vectors, k)

    expected = MilvusRetriever(replace(whole, concurrency=1), ENCODER)(QUERIES)
    monkeypatch.setattr(retriever, "_ask", spy)
    assert retriever([*QUERIES, "", *QUERIES[:3]]) == [*expected, (), *expected[:3]]
    assert sorted(sizes) == [10] * 4  # each of the 40 once, blank ones and repetitions not at all
    assert len(threads) > 1


def test_hostile_texts_are_only_texts(place):
    texts = ['" or position > 0 or "', "'; drop collection docs", "a {b} \\ \ud800 \x00 </search>", "x" * 60_000]
    documents = [Document(f"d{i}", f'T"{i}', text) for i, text in enumerate(texts)]
    retriever = MilvusRetriever(place, ENCODER, k=4, corpus=documents)
    assert len(retriever(texts)) == 4
    assert retriever(["drop collection"])[0][0] == documents[1]
    with pytest.raises(InputError, match=r"keeps 65535 bytes of a content; got 70003 bytes of 'long'. Cut the doc"):
        MilvusRetriever(replace(place, collection="other"), ENCODER, corpus=[Document("long", "L", "x" * 70_000)])


def test_a_rollout_on_milvus_is_one_on_our_index(place):
    """The same actions, documents and ends; at most one document a search, so that the ranking matters."""
    ours = toy_retriever()
    ours = HybridRetriever(ours.corpus, ours.encoder, k=1, lexical=False)
    theirs = MilvusRetriever(place, ours.encoder, k=1, lexical=False, corpus=ours.corpus.documents)
    config = DecoderConfig(vocab=16, model=16, layers=1, query_heads=2, kv_heads=2, head_dim=8, feed_forward=32)
    policy = Policy(config, init(specs(config), jax.random.key(0)), init(critic_specs(config), jax.random.key(1)))
    runs = []
    for retriever in (ours, theirs):
        rollout = Rollout(config, toy_codec(), retriever, Sampling(3, 3), Rules(max_turns=4, select="score"), batch=8)
        runs.append([trajectory.final for trajectory in rollout.run(policy, toy_examples(8), jax.random.key(5))])
    assert runs[0] == runs[1]
    assert any(turn.documents for final in runs[0] for turn in final.turns)


def test_an_evaluation_searches_its_preset_on_milvus(place, tmp_path):
    from bert_sample import write_bert  # here: torch takes long to import, and a test below starts another process

    folder = write_bert(tmp_path / "bert")
    qa = Qa(Local("no folder"), tmp_path, benchmark="hotpotqa", retriever="milvus", milvus=place, encoder=folder)
    small = Corpus.from_documents(DOCUMENTS[:60])
    found = open_retriever(qa, small, tmp_path)(QUERIES[:8])
    ours = open_retriever(replace(qa, retriever="preset"), small, tmp_path)(QUERIES[:8])
    assert {len(row) for row in found} == {32}
    assert shared(found, ours) >= 0.9
    assert open_retriever(qa, Corpus((), {}), tmp_path)(QUERIES[:8]) == found  # the collection as it is
    assert open_retriever(replace(qa, agent="cot"), Corpus((), {}), tmp_path)(["a"]) == [()]


def test_what_decides_an_evaluation_is_kept(place, tmp_path):
    qa = Qa(Local("no folder"), tmp_path, retriever="milvus", milvus=replace(place, filter="title > 'a'"))
    write_whole(tmp_path / "job.json", json.dumps({"experiment": "qa", **deciding(qa)}, default=str))
    assert evaluated(tmp_path).milvus == qa.milvus
    assert deciding(replace(qa, milvus=replace(qa.milvus, timeout=1.0, concurrency=1))) == deciding(qa)
    assert deciding(replace(qa, milvus=place)) != deciding(qa)
    assert "milvus" not in deciding(replace(qa, retriever="bm25"))


# ---------------------------------------------------------------- making, kills and opening again


@pytest.mark.parametrize("moment", [1, 3, 4])
def test_a_killed_call_goes_on_where_it_was(place, moment, capsys):
    told = []

    def until(count):
        told.append(count)
        if len(told) == moment:
            raise Killed

    with pytest.raises(Killed):
        Collection(place).make(ENCODER, DOCUMENTS, progress=until)
    with pytest.raises(InputError, match=rf"docs is not whole; got {100 * moment} of 450 documents. Give the corpus"):
        MilvusRetriever(place, ENCODER)
    again = []
    Collection(place).make(ENCODER, DOCUMENTS, progress=again.append)
    assert again[0] == 100 * moment + (50 if moment == 4 else 100)
    assert Collection(place).count() == len(DOCUMENTS)
    exact = HybridRetriever(CORPUS, ENCODER, k=10, lexical=False)(QUERIES)
    assert shared(MilvusRetriever(place, ENCODER, k=10, lexical=False)(QUERIES), exact) >= 0.99

    def never():
        raise AssertionError("written again")

    MilvusRetriever(place, ENCODER, corpus=DOCUMENTS, vectors=never)
    assert "to Milvus" not in capsys.readouterr().err


def test_a_process_that_vanishes_leaves_whole_batches(place):
    """Killed by the system in the middle of a batch: what it had written is there, and nothing is written twice."""
    script = (
        "import os, sys; from test_milvus import *; milvus_collection.BATCH = 100; row = milvus_collection._row;"
        "milvus_collection._row = lambda i, *rest: os._exit(9) if i == 250 else row(i, *rest);"
        "Collection(Milvus(sys.argv[1], 'docs', index='FLAT')).make(ENCODER, DOCUMENTS)"
    )
    here = Path(__file__).resolve().parent
    path = os.pathsep.join([str(here), str(here.parent), *sys.path])
    command = [sys.executable, "-c", script, place.uri]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, timeout=120, capture_output=True)
    assert done.returncode == 9, done.stderr.decode()
    told = []
    Collection(place).make(ENCODER, DOCUMENTS, progress=told.append)
    assert told == [300, 400, 450]
    assert Collection(place).count() == 450


def test_part_of_a_batch_is_written_again(place):
    collection = Collection(place)
    collection._create(ENCODER, DOCUMENTS)
    vectors = embed(ENCODER.document, DOCUMENTS)
    rows = [milvus_collection._row(i, DOCUMENTS[i], vectors[i]) for i in range(130)]
    collection.request("upsert", data=rows)
    told = []
    collection.make(ENCODER, DOCUMENTS, progress=told.append)
    assert told == [200, 300, 400, 450]
    assert collection.count() == 450


def test_a_collection_is_there_when_the_server_comes_back(place, tmp_path, capsys):
    vectors = lambda: stored_vectors(tmp_path, ENCODER.document, DOCUMENTS)  # noqa: E731
    before = MilvusRetriever(place, ENCODER, k=5, corpus=DOCUMENTS, vectors=vectors)
    assert "to Milvus: 100%" in capsys.readouterr().err
    found = before(QUERIES)
    before.close()
    server_manager_instance.release_server(place.uri)
    assert MilvusRetriever(place, ENCODER, k=5)(QUERIES) == found


# ---------------------------------------------------------------- collections of others


def test_a_collection_of_other_content_is_refused_and_left(place):
    Collection(place).make(ENCODER, DOCUMENTS[:30], progress=lambda count: None)
    other = TfidfEncoder.fit(CORPUS.texts(), dim=48, seed=1)
    moved = [DOCUMENTS[0], replace(DOCUMENTS[1], id="another id"), *DOCUMENTS[2:30]]
    for encoder, documents, message in (
        (ENCODER, DOCUMENTS[:29], "the collection docs holds another corpus"),
        (ENCODER, moved, "the collection docs holds another corpus"),
        (other, DOCUMENTS[:30], "the collection docs holds vectors of another encoder"),
        (TfidfEncoder.fit(CORPUS.texts(), dim=12), DOCUMENTS[:30], "vectors of another width; got 48 and not 12"),
        (replace(ENCODER, similarity="euclidean"), None, "vectors of another metric; got IP and not L2"),
    ):
        with pytest.raises(InputError, match=f"{message}.*Name another collection"):
            MilvusRetriever(place, encoder, corpus=documents)
    assert Collection(place).count() == 30
    assert Collection(place).check(ENCODER, DOCUMENTS[:30]) == 30


def test_a_collection_of_someone_else_is_refused(place):
    pymilvus.MilvusClient(place.uri).create_collection("docs", dimension=48)
    with pytest.raises(InputError, match="the collection docs was not made here"):
        MilvusRetriever(place, ENCODER, corpus=DOCUMENTS)


def test_what_is_missing_or_wrong_is_named(place, tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"Milvus has no collection docs; got .*Name one that is there, or give"):
        MilvusRetriever(place, ENCODER)
    with pytest.raises(InputError, match="a collection needs documents"):
        MilvusRetriever(place, ENCODER, corpus=[])
    with pytest.raises(InputError, match=r"needs vectors \[450, 48\]; got \[3, 48\]"):
        MilvusRetriever(place, ENCODER, corpus=DOCUMENTS, vectors=lambda: np.zeros((3, 48), np.float32))
    with pytest.raises(InputError, match="k=0"):
        MilvusRetriever(place, ENCODER, k=0)
    with pytest.raises(InputError, match=r"no Milvus answers at http://127.0.0.1:1; got .*Start the server"):
        Collection(Milvus("http://127.0.0.1:1", timeout=1))
    with pytest.raises(InputError, match=r"no Milvus answers at .*not exists"):
        Collection(Milvus(str(tmp_path / "missing" / "index.db")))
    with pytest.raises(InputError, match=r"unknown index; got 'BTREE'. Known: AUTOINDEX, FLAT"):
        Collection(replace(place, index="BTREE"))
    with pytest.raises(InputError, match="requests must be possible"):
        Collection(replace(place, concurrency=0))
    monkeypatch.delenv("MILVUS_TEST_TOKEN", raising=False)
    with pytest.raises(InputError, match="there is no token; got MILVUS_TEST_TOKEN is not set"):
        Collection(replace(place, token_variable="MILVUS_TEST_TOKEN"))
    monkeypatch.setitem(sys.modules, "pymilvus", None)
    with pytest.raises(InputError, match=r"needs the package pymilvus; got .*pip install 'jraggym\[milvus\]'"):
        Collection(place)


@pytest.mark.parametrize("index", ["SCANN", "DISKANN"])
def test_an_index_that_the_server_lacks_is_refused(place, index):
    with pytest.raises(InputError, match=f"milvus-lite has no such index; got {index}. Use FLAT"):
        MilvusRetriever(replace(place, index=index), ENCODER, corpus=DOCUMENTS)


def test_what_the_server_refuses_is_told(place, monkeypatch):
    monkeypatch.setattr(milvus_collection, "built", lambda index, size: {"bm25_k1": 1.0, "nlist": -1})
    monkeypatch.setattr(milvus_collection, "_METRIC", {"cosine": "HAMMING"})
    with pytest.raises(InputError, match=r"refuses a collection; got .*HAMMING"):
        MilvusRetriever(place, ENCODER, corpus=DOCUMENTS)


def test_query_vectors_of_another_width_are_refused(whole):
    retriever = MilvusRetriever(whole, ENCODER)
    with pytest.raises(InputError, match=r"query vectors must be \[1, 48\]; got \[1, 12\]"):
        retriever.search(["sea"], np.ones((1, 12), np.float32))


def test_digits_tell_corpora_apart():
    a, b = Document("a", "T", "x. y"), Document("b", "T. x", "y")
    assert written(a) == written(b)
    assert len({corpus_digits(documents) for documents in ([a], [b], [a, b], [b, a], [])}) == 5


# ---------------------------------------------------------------- outages


def flaky(retriever, monkeypatch, errors):
    """Requests of the client fail with these errors before they succeed; gives the list of the names asked for."""
    client, asked, left = retriever._collection._client, [], list(errors)
    for name in ("search", "hybrid_search"):
        original = getattr(client, name)

        def call(*arguments, name=name, original=original, **named):
            asked.append((name, named["timeout"]))
            if left:
                raise left.pop(0)
            return original(*arguments, **named)

        monkeypatch.setattr(client, name, call)
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda seconds: None)
    return asked


def late(code="DEADLINE_EXCEEDED"):
    import grpc

    error = grpc.RpcError()
    error.code = lambda: getattr(grpc.StatusCode, code)
    return error


def test_passing_failures_are_retried(whole, monkeypatch):
    retriever = MilvusRetriever(replace(whole, timeout=7.0), ENCODER)
    expected = retriever(QUERIES[:1])
    busy = pymilvus.MilvusException(8, "rate limit", retriable=True)
    asked = flaky(retriever, monkeypatch, [late(), busy])
    assert retriever(QUERIES[:1]) == expected
    assert asked == [("hybrid_search", 7.0)] * 3


def test_the_last_failure_is_raised_and_a_lasting_one_at_once(whole, monkeypatch):
    retriever = MilvusRetriever(whole, ENCODER)
    asked = flaky(retriever, monkeypatch, [late("UNAVAILABLE")] * 5)
    with pytest.raises(type(late())):
        retriever(QUERIES[:1])
    assert len(asked) == whole.attempts
    asked = flaky(retriever, monkeypatch, [pymilvus.MilvusException(65535, "bad request")] * 5)
    with pytest.raises(pymilvus.MilvusException, match="bad request"):
        retriever(QUERIES[:1])
    assert len(asked) == 1


def test_a_server_that_goes_away_is_an_error_and_no_hang(place):
    retriever = MilvusRetriever(replace(place, timeout=0.5, attempts=1), ENCODER, corpus=DOCUMENTS[:9])
    server_manager_instance.release_server(place.uri)
    with pytest.raises(pymilvus.MilvusException):
        retriever(QUERIES[:2])


def test_searches_have_the_parameters_of_their_index():
    assert searched("FLAT", 10, 10) == built("FLAT", 10) == {}
    assert searched("SCANN", 10_000, 10) == {"nprobe": 200, "reorder_k": 128}
    assert built("SCANN", 10_000) == {"nlist": 400, "with_raw_data": True}
    assert searched("SCANN", 1, 100) == {"nprobe": 2, "reorder_k": 400}
    assert built("IVF_FLAT", 10**9) == {"nlist": 4_096}
    assert searched("DISKANN", 10**9, 100) == {"search_list": 400}
