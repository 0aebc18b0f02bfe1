"""What indexes take: memory below that of the vectors they index, and sizes that the sizing table foretells."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parent / "benchmarks"))
from retrieval_memory import Config, exact, measure

from jraggym.retrieval import dense
from jraggym.retrieval.dense import DenseIndex


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the resident memory as Linux tells it")
def test_vectors_of_a_file_are_searched_in_less_memory_than_they_take(tmp_path):
    """153.6 MB of vectors on disk; trees of few vectors, so that building them is quick and takes little."""
    config = Config(documents=100_000, dim=384, queries=64, chunk=5_000)
    found, size = measure(tmp_path, config), 4 * 100_000 * 384
    assert found["searching"] < 0.6 * size  # at the most, from the imports to the last search
    assert found["recall"] >= 0.9


@pytest.mark.parametrize("similarity", ["dot", "euclidean"])
def test_several_trees_find_what_one_finds(monkeypatch, similarity):
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(40, 32))[rng.integers(40, size=3_000)] + rng.normal(size=(3_000, 32))
    vectors = (vectors * rng.uniform(0.5, 2, size=(3_000, 1))).astype(np.float32)
    queries = vectors[:30] + 0.1 * rng.normal(size=(30, 32)).astype(np.float32)
    truth = DenseIndex(vectors, similarity).search(queries, 10)  # exact: below TREE_FROM
    monkeypatch.setattr(dense, "TREE_FROM", 500)
    monkeypatch.setattr(dense, "CHUNK", 1_000)
    index = DenseIndex(vectors, similarity)
    assert [start for start, _ in index._trees] == [0, 1_000, 2_000]
    found = index.search(queries, 10)
    assert np.mean([len(np.intersect1d(a, b)) / 10 for a, b in zip(found, truth, strict=True)]) >= 0.95
    for i in range(0, 30, 7):  # a result depends on its query alone
        np.testing.assert_array_equal(index.search(queries[i : i + 1], 10)[0], found[i])
    few = index.search(queries[:2], 2_999)
    assert all(len(set(row[row >= 0])) == (row >= 0).sum() for row in few)
    if similarity == "dot":
        np.testing.assert_array_equal(np.sort(exact(vectors, queries, 10)), np.sort(truth))


def test_a_mapped_file_is_read_by_rows_and_searched_as_an_array_is(monkeypatch, tmp_path):
    rng = np.random.default_rng(0)
    np.save(tmp_path / "vectors.npy", rng.normal(size=(1_200, 16)).astype(np.float32))
    monkeypatch.setattr(dense, "TREE_FROM", 500)
    mapped, array, changed = (np.load(tmp_path / "vectors.npy", mmap_mode=mode) for mode in ("r", None, "c"))
    index = DenseIndex(mapped)
    np.testing.assert_array_equal(index._file.rows(np.array([3, 1_199, -1])), array[[3, 1_199, -1]])
    np.testing.assert_array_equal(index.search(array[:9], 5), DenseIndex(array).search(array[:9], 5))
    part = DenseIndex(mapped[100:])  # a part of a file is an array like any other
    np.testing.assert_array_equal(part.search(array[:9], 5), DenseIndex(array[100:]).search(array[:9], 5))
    assert [part._file, DenseIndex(changed)._file] == [None, None]  # of a changed copy the file knows nothing


def test_what_is_not_finite_is_named_with_its_rows(monkeypatch):
    from jraggym.errors import InputError

    monkeypatch.setattr(dense, "CHUNK", 100)
    monkeypatch.setattr(dense, "TREE_FROM", 50)
    vectors = np.random.default_rng(0).normal(size=(300, 8)).astype(np.float32)
    vectors[250, 3] = np.nan
    with pytest.raises(InputError, match="not all finite; got nan or inf in row 200 to 300"):
        DenseIndex(vectors)
