"""A sharded index finds what one index finds, serves a rollout as it is, and reads its texts from disk."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from array_samples import random_weights
from host_jobs import CONFIG, search_sharded
from toy_world import TEXTS, toy_codec, toy_examples

from jraggym.episodes import Rules
from jraggym.errors import InputError
from jraggym.labelling import support_judge
from jraggym.models.decoder import specs
from jraggym.retrieval.corpus import Corpus
from jraggym.retrieval.dense import DenseIndex
from jraggym.retrieval.encoder import TfidfEncoder, embed
from jraggym.retrieval.hybrid import HybridRetriever
from jraggym.retrieval.sharded import ShardedRetriever
from jraggym.retrieval.texts import Texts, write_texts
from jraggym.rollout import Policy, Rollout
from jraggym.sampling import Sampling
from jraggym.sharding import make_mesh
from jraggym.types import Document


@pytest.fixture(scope="module")
def world():
    """Forty documents, some of them the same text in different parts; encoder and vectors."""
    texts = [TEXTS[i % 6] if i % 4 else f"{TEXTS[i % 6]} It is number {i}." for i in range(40)]
    corpus = Corpus.from_documents(Document(f"d{i}", f"Title {i % 6}", text) for i, text in enumerate(texts))
    encoder = TfidfEncoder.fit(corpus.texts(), dim=8)
    return corpus, encoder, embed(encoder.document, corpus.documents)


QUERIES = ["mayor of Morn", "harbour museum", "", "Ada Lindqvist novels", "zzz", "the weather of hills and rivers"]


@pytest.mark.parametrize("shape", [(4, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize("k", [1, 7, 12])
def test_it_finds_what_one_index_finds(world, shape, k):
    corpus, encoder, vectors = world
    one = HybridRetriever(corpus, encoder, k, lexical=False, vectors=vectors)
    spread = ShardedRetriever(corpus, encoder, vectors, make_mesh(*shape), k)
    assert spread(QUERIES) == one(QUERIES)
    assert [len(found) for found in spread(QUERIES)] == [k, k, 0, k, 0, k], "the third is blank, the fifth unknown"


def test_scores_and_ties_are_those_of_one_index():
    vectors, found = search_sharded(make_mesh(4))
    np.testing.assert_array_equal(found, DenseIndex(vectors[0]).search(vectors[1], 9))


def test_a_rollout_takes_it_as_it_is(world):
    corpus, encoder, vectors = world
    mesh, weights = make_mesh(2, 1, 2), random_weights(specs(CONFIG))
    retrievers = (
        HybridRetriever(corpus, encoder, 2, lexical=False, vectors=vectors),
        ShardedRetriever(corpus, encoder, vectors, mesh),
    )
    rules = Rules(3, "reward", support_judge)
    runs = [
        Rollout(CONFIG, toy_codec(), retriever, Sampling(2, 3), rules, batch=4, mesh=mesh).run(
            Policy(CONFIG, jax.tree.map(jnp.asarray, weights)), toy_examples(6), jax.random.key(0)
        )
        for retriever in retrievers
    ]
    assert runs[0] == runs[1]
    assert any(turn.documents for episode in runs[1] for turn in episode.final.turns), "nothing was ever found"


def test_a_part_that_fails_is_no_empty_result(world, monkeypatch):
    corpus, encoder, vectors = world
    spread = ShardedRetriever(corpus, encoder, vectors, make_mesh(4))
    _, index = spread._parts[2]
    monkeypatch.setattr(index, "nearest", lambda vectors, k: 1 / 0)
    with pytest.raises(RuntimeError, match="a part of the index could not be searched"):
        spread(["harbour"])


def test_devices_on_their_own_are_refused(world):
    corpus, encoder, vectors = world
    mesh = make_mesh(4)
    spread = ShardedRetriever(corpus, encoder, vectors, mesh)
    whole = jax.sharding.PartitionSpec()
    alone = jax.shard_map(spread.encode, mesh=mesh, in_specs=whole, out_specs=whole, check_vma=False)
    with pytest.raises(InputError, match="needs all devices at once"):
        alone(spread.params, *spread.tokenize(["harbour"]))


def test_what_does_not_fit_is_refused(world):
    corpus, encoder, vectors = world
    with pytest.raises(InputError, match="40 documents, 39 vectors"):
        ShardedRetriever(corpus, encoder, vectors[:39], make_mesh(4))
    few = Corpus.from_documents(corpus.documents[:3])
    with pytest.raises(InputError, match="cannot be spread; got k=2, 3 documents, 3 vectors, 4 devices"):
        ShardedRetriever(few, encoder, vectors[:3], make_mesh(4))
    with pytest.raises(InputError, match="Build it with k=3"):
        ShardedRetriever(corpus, encoder, vectors, make_mesh(4))(["harbour"], k=3)


# ---------------------------------------------------------------- texts on disk


def test_texts_come_back_by_position(world, tmp_path):
    corpus, encoder, vectors = world
    texts = write_texts(tmp_path / "deep" / "texts", corpus.documents)
    assert [texts[i] for i in range(len(texts))] == list(corpus.documents)
    assert Texts(tmp_path / "deep" / "texts")[17] == corpus[17]
    assert ShardedRetriever(texts, encoder, vectors, make_mesh(4))(["harbour museum"])[0][0].title == "Title 3"
    with pytest.raises(IndexError, match="document 40 of 40"):
        texts[40]


def test_texts_that_are_missing_empty_or_damaged_are_refused(world, tmp_path):
    path = tmp_path / "texts"
    with pytest.raises(InputError, match="cannot read"):
        Texts(path)
    with pytest.raises(InputError, match="no document to write"):
        write_texts(path, [])
    assert not path.exists()
    write_texts(path, world[0].documents)
    damaged = bytearray(path.read_bytes())
    damaged[100] ^= 255
    path.write_bytes(damaged)
    with pytest.raises(InputError, match=r"damaged|cannot read"):
        [Texts(path)[i] for i in range(40)]
