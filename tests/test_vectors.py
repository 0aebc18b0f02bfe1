"""Vectors of a corpus on disk: whole or gone on with, on any mesh, and read without a copy."""

import contextlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from bert_sample import write_bert

from jraggym.errors import InputError
from jraggym.models.bert_encoder import BertEncoder
from jraggym.retrieval import dense
from jraggym.retrieval.dense import DenseIndex
from jraggym.retrieval.encoder import TfidfEncoder, embed
from jraggym.retrieval.vectors import fingerprint, stored_vectors
from jraggym.sharding import make_mesh

TEXTS = [f"{'sea port novel hill ' * (i % 7)}text {i}" for i in range(23)]
TOWER = TfidfEncoder.fit(TEXTS, dim=6).document


class Killed(BaseException):
    pass


def test_vectors_are_those_of_embed_and_made_once(tmp_path, capsys):
    vectors = stored_vectors(tmp_path, TOWER, TEXTS, batch=4, chunk=8)
    assert "embedding: 100%" in capsys.readouterr().err
    assert isinstance(vectors, np.memmap)
    assert vectors.dtype == np.float32
    assert not vectors.flags.writeable
    np.testing.assert_array_equal(vectors, embed(TOWER, TEXTS, batch=4))
    assert [path.name for path in tmp_path.iterdir()] == [f"vectors-{fingerprint(TOWER, TEXTS)}.npy"]

    def never(count):
        raise AssertionError("embedded again")

    np.testing.assert_array_equal(stored_vectors(tmp_path, TOWER, TEXTS, progress=never), vectors)


@pytest.mark.parametrize("moment", range(1, 7))
def test_a_killed_call_goes_on_to_the_same_bytes(tmp_path, moment):
    whole = stored_vectors(tmp_path / "whole", TOWER, TEXTS, batch=4, chunk=8)
    told = []

    def until(count):
        told.append(count)
        if len(told) == moment:
            raise Killed

    with pytest.raises(Killed):
        stored_vectors(tmp_path / "killed", TOWER, TEXTS, batch=4, chunk=8, progress=until)
    assert not list((tmp_path / "killed").glob("*.npy"))
    again = []
    vectors = stored_vectors(tmp_path / "killed", TOWER, TEXTS, batch=4, chunk=8, progress=again.append)
    assert Path(vectors.filename).read_bytes() == Path(whole.filename).read_bytes()
    assert again[0] == 8 * ((moment - 1) // 2) + 4  # whole chunks of two batches are kept
    assert [path.suffix for path in (tmp_path / "killed").iterdir()] == [".npy"]


@pytest.mark.parametrize("call", ["replace", "unlink"])
def test_a_kill_between_two_files_loses_nothing(tmp_path, monkeypatch, call):
    """The moments around each rename: before the count is replaced, before the whole file gets its name, and after."""
    expected, original = embed(TOWER, TEXTS, batch=4), getattr(os, call)
    for moment in range(5):
        calls = iter(range(9))

        def die(*arguments, calls=calls, moment=moment, **named):
            if next(calls) == moment:
                raise Killed
            return original(*arguments, **named)

        folder = tmp_path / str(moment)
        with monkeypatch.context() as patch:
            patch.setattr(os, call, die)
            with contextlib.suppress(Killed):
                stored_vectors(folder, TOWER, TEXTS, batch=4, chunk=8)
        np.testing.assert_array_equal(stored_vectors(folder, TOWER, TEXTS, batch=4, chunk=8), expected)


def test_a_process_that_vanishes_leaves_whole_chunks(tmp_path):
    script = (
        "import os, sys; from test_vectors import *;"
        "stored_vectors(sys.argv[1], TOWER, TEXTS, batch=4, chunk=8, progress=lambda n: n >= 20 and os._exit(9))"
    )
    here = Path(__file__).resolve().parent
    path = os.pathsep.join([str(here), str(here.parent)])
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, timeout=120, capture_output=True)
    assert done.returncode == 9, done.stderr.decode()
    told = []
    vectors = stored_vectors(tmp_path, TOWER, TEXTS, batch=4, chunk=8, progress=told.append)
    assert told == [20, 23]
    np.testing.assert_array_equal(vectors, embed(TOWER, TEXTS, batch=4))


def test_eight_devices_give_what_one_gives(tmp_path):
    tower = BertEncoder.load(write_bert(tmp_path / "bert"), "e5").document
    one = embed(tower, TEXTS, batch=8)
    for mesh in (make_mesh(data=8), make_mesh(data=2, fsdp=4)):
        np.testing.assert_allclose(embed(tower, TEXTS, batch=8, mesh=mesh), one, atol=1e-6)
        stored = stored_vectors(tmp_path / str(mesh.shape["fsdp"]), tower, TEXTS, batch=5, mesh=mesh, chunk=16)
        np.testing.assert_allclose(stored, one, atol=1e-6)


def test_rows_are_split_over_the_devices(tmp_path):
    tower, seen = BertEncoder.load(write_bert(tmp_path / "bert"), "e5").document, []

    class Watched:
        params, dim, max_tokens = tower.params, tower.dim, tower.max_tokens
        tokenize = staticmethod(tower.tokenize)

        @staticmethod
        def apply(params, ids, mask):
            jax.debug.inspect_array_sharding(ids, callback=seen.append)
            return tower.apply(params, ids, mask)

    embed(Watched(), TEXTS, batch=16, mesh=make_mesh(data=8))
    assert {sharding.shard_shape((16, 1)) for sharding in seen} == {(2, 1)}


def test_other_texts_weights_and_settings_have_other_files(tmp_path):
    bert = BertEncoder.load(write_bert(tmp_path / "bert"), "e5")
    other = TfidfEncoder.fit(TEXTS, dim=6, seed=1).document
    prints = [fingerprint(TOWER, TEXTS), fingerprint(TOWER, TEXTS[:-1]), fingerprint(other, TEXTS)]
    prints += [fingerprint(bert.query, TEXTS), fingerprint(bert.document, TEXTS)]
    assert len(set(prints)) == len(prints)
    assert fingerprint(TOWER, TEXTS) == fingerprint(TfidfEncoder.fit(TEXTS, dim=6).document, TEXTS)


def test_bad_input_is_named(tmp_path):
    with pytest.raises(InputError, match="no text to embed"):
        stored_vectors(tmp_path, TOWER, [])
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot keep vectors in"):
        stored_vectors(tmp_path / "file", TOWER, TEXTS)


def header(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


DAMAGE = {  # of a file of 23 rows of 6 numbers
    "empty": lambda whole: b"",
    "cut in the header": lambda whole: whole[:40],
    "cut": lambda whole: whole[:-1],
    "longer": lambda whole: whole + b"x",
    "no magic": lambda whole: b"x" + whole[1:],
    "pickled": lambda whole: b"\x80\x04." + whole[3:],
    "zipped": lambda whole: b"PK\x03\x04" + whole[4:],
    "header of zeros": lambda whole: whole[:10] + bytes(118) + whole[128:],
    "header that is no dict": lambda whole: whole[:10] + b"[" + whole[11:],
    "header without an end": lambda whole: whole.replace(b"}", b"("),
    "another version": lambda whole: whole[:6] + b"\x09" + whole[7:],
    "another dtype": lambda whole: header(np.zeros((23, 6))),
    "other bytes' order": lambda whole: whole.replace(b"<f4", b">f4"),
    "another shape": lambda whole: header(np.zeros((6, 23), np.float32)),
    "columns first": lambda whole: header(np.zeros((23, 6), np.float32, order="F")),
    "objects": lambda whole: header(np.array([None])),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_named_and_left(tmp_path, damage):
    path = Path(stored_vectors(tmp_path, TOWER, TEXTS, batch=4, chunk=8).filename)
    whole = path.read_bytes()
    broken = DAMAGE[damage](whole)
    assert broken != whole
    part, done = path.with_suffix(".part"), path.with_suffix(".done")
    for damaged in (path, part):
        path.unlink(missing_ok=True)
        damaged.write_bytes(broken)
        done.write_text("16")
        with pytest.raises(InputError, match=rf"{re.escape(str(damaged))} is damaged; got .*Remove this file"):
            stored_vectors(tmp_path, TOWER, TEXTS, batch=4, chunk=8)
        assert damaged.read_bytes() == broken
    part.unlink()
    stored_vectors(tmp_path, TOWER, TEXTS, batch=4, chunk=8)
    assert path.read_bytes() == whole


@pytest.mark.parametrize("count", [b"", b"x", b"-1", b"24", b"1.5", b"\xff"])
def test_a_damaged_count_is_named(tmp_path, count):
    path = Path(stored_vectors(tmp_path, TOWER, TEXTS, batch=4, chunk=8).filename)
    whole = path.read_bytes()
    path.rename(path.with_suffix(".part"))
    path.with_suffix(".done").write_bytes(count)
    with pytest.raises(InputError, match=r"\.done is damaged; got .*Remove this file"):
        stored_vectors(tmp_path, TOWER, TEXTS, batch=4, chunk=8)
    path.with_suffix(".done").unlink()
    assert Path(stored_vectors(tmp_path, TOWER, TEXTS, batch=4, chunk=8).filename).read_bytes() == whole


# ---------------------------------------------------------------- in ScaNN


def test_the_index_reads_the_mapped_file_itself(tmp_path, monkeypatch):
    vectors, given = stored_vectors(tmp_path, TOWER, TEXTS, progress=lambda count: None), []
    build = dense._build
    monkeypatch.setattr(dense, "_build", lambda array, measure: given.append(array) or build(array, measure))
    found = DenseIndex(vectors).search(vectors[:3], 4)
    assert np.shares_memory(given[0], vectors)
    np.testing.assert_array_equal(found, DenseIndex(np.array(vectors)).search(vectors[:3], 4))


def ranked(vectors, queries, similarity):
    """The exact ten best."""
    products = queries @ vectors.T
    distances = {
        "dot": -products,
        "cosine": -products / np.linalg.norm(vectors, axis=1),
        "euclidean": (vectors**2).sum(1) - 2 * products,
    }
    return np.argsort(distances[similarity], axis=1)[:, :10]


def shared(a, b):
    return np.mean([len(np.intersect1d(x, y)) / 10 for x, y in zip(a, b, strict=True)])


@pytest.mark.parametrize("count", [600, dense.TREE_FROM])
@pytest.mark.parametrize("similarity", ["dot", "euclidean"])
def test_vectors_of_any_length_are_ranked(similarity, count):
    """Lengths from 0.5 to 2, so that the three similarities rank differently; exact, and with tree and hashing."""
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(50, 64))[rng.integers(50, size=count + 50)] + 1.5 * rng.normal(size=(count + 50, 64))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors, queries = vectors[:-50] * rng.uniform(0.5, 2, size=(count, 1)), vectors[-50:]
    found = DenseIndex(vectors, similarity).search(queries, 10)
    exact = ranked(vectors, queries, similarity)
    if count < dense.TREE_FROM:
        np.testing.assert_array_equal(found, exact)
    assert shared(found, exact) >= 0.97
    assert shared(ranked(vectors, queries, "cosine"), exact) < 0.9


def test_an_unknown_similarity_is_named():
    with pytest.raises(InputError, match="unknown similarity; got 'manhattan'"):
        DenseIndex(np.eye(2, dtype=np.float32), "manhattan")


def test_each_width_is_compiled_once_however_often_texts_are_embedded():
    traced = []

    class Watched:
        params, dim, max_tokens, tokenize = TOWER.params, TOWER.dim, TOWER.max_tokens, staticmethod(TOWER.tokenize)

        @staticmethod
        def apply(params, ids, mask):
            traced.append(ids.shape)
            return TOWER.apply(params, ids, mask)

    tower = Watched()
    for _ in range(3):
        embed(tower, TEXTS, batch=4)
    assert traced
    assert len(traced) == len(set(traced))
