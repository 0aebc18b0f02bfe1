"""Recall of BM25, dense vectors and their fusion on questions with gold paragraphs over a shared corpus.

    python -m eval.retrieval --dataset hotpotqa --data-dir DIR --encoder minilm

DIR holds pooled_questions.jsonl and pooled_corpus.jsonl. About five minutes on one CPU core with MiniLM over
5,000 paragraphs, some seconds with tfidf. Expected there with MiniLM, all gold at 5 / 20: BM25 .52 / .86,
dense .51 / .77, fused .58 / .88.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from tqdm import tqdm

from jraggym.data.hotpotqa import read_pooled
from jraggym.data.questions import QuestionSet
from jraggym.errors import exit_on_input_error
from jraggym.models.bert_encoder import BertEncoder, minilm_path
from jraggym.retrieval.dense import TREE_FROM, DenseIndex
from jraggym.retrieval.encoder import Encoder, TfidfEncoder, embed
from jraggym.retrieval.hybrid import HybridRetriever
from jraggym.types import Document, Example

DEPTHS = (5, 10, 20, 32)
FUSION_DEPTH = 100
READERS = {"hotpotqa": read_pooled}


@dataclass(frozen=True)
class Config:
    """Which questions, and which encoder."""

    data_dir: Path  # folder with the pooled files
    dataset: Literal["hotpotqa"] = "hotpotqa"
    encoder: str = "minilm"  # minilm, tfidf, or the folder of a BERT sentence encoder
    batch: int | None = None  # texts per encoder call; None suits the device


def recall(found: Sequence[tuple[Document, ...]], examples: Sequence[Example], depth: int) -> tuple[float, float]:
    """Gives the shares of the questions with some, and with all, gold documents among the first `depth`."""
    hits = [
        [gold in {document.id for document in documents[:depth]} for gold in example.support]
        for documents, example in zip(found, examples, strict=True)
    ]
    return float(np.mean([any(row) for row in hits])), float(np.mean([all(row) for row in hits]))


def agreement(corpus: np.ndarray, queries: np.ndarray, k: int) -> float:
    """Gives the mean share of the exact k best that the index finds, for f32 [n, D] and [Q, D]."""
    k = min(k, len(corpus))
    found = DenseIndex(corpus).search(queries, k)
    exact = np.argsort(-(queries @ corpus.T), axis=1, kind="stable")[:, :k]
    return float(np.mean([len(np.intersect1d(a, b)) / k for a, b in zip(found, exact, strict=True)]))


def evaluate(questions: QuestionSet, encoder: Encoder, batch: int | None = None) -> str:
    """Gives the table and the agreement line, as text."""
    examples = [example for example in questions.examples if example.support]
    queries, texts = [example.question for example in examples], questions.corpus.texts()
    with tqdm(total=len(texts), desc="embedding", unit="text", file=sys.stderr) as bar:
        vectors = embed(
            encoder.document, questions.corpus.documents, batch, progress=lambda done: bar.update(done - bar.n)
        )
    query_vectors = embed(encoder.query, queries, batch)
    top = max(DEPTHS)
    retrievers = {
        "bm25": HybridRetriever(questions.corpus, k=top),
        "dense": HybridRetriever(questions.corpus, encoder, k=top, lexical=False, vectors=vectors),
        "fused": HybridRetriever(questions.corpus, encoder, k=top, depth=FUSION_DEPTH, vectors=vectors),
    }
    lines = [f"{len(examples)} questions, {len(texts)} paragraphs", _header()]
    for name, retriever in retrievers.items():
        found = retriever.search(queries, query_vectors)
        some, every = zip(*(recall(found, examples, depth) for depth in DEPTHS), strict=True)
        lines.append(f"{name:<6}" + "".join(f"{share:>9.3f}" for share in (*some, *every)))
    kind = "exact search" if len(texts) < TREE_FROM else "tree and hashing"
    share = agreement(vectors, query_vectors, top)
    return "\n".join([*lines, f"ScaNN ({kind}) agrees with exact search on {share:.4f} of the top {top}"])


def _header() -> str:
    return " " * 6 + "".join(f"{f'{kind}@{depth}':>9}" for kind in ("some", "all") for depth in DEPTHS)


def load_encoder(name: str, texts: Sequence[str]) -> Encoder:
    """Loads or fits the encoder of the given name; raises InputError for a folder that is no such model."""
    if name == "tfidf":
        return TfidfEncoder.fit(texts)
    return BertEncoder.load(minilm_path() if name == "minilm" else name)


def main() -> None:
    """Reads the command line and prints the table."""
    config = tyro.cli(Config, description=__doc__)
    with exit_on_input_error():
        questions = READERS[config.dataset](config.data_dir)
        print(evaluate(questions, load_encoder(config.encoder, questions.corpus.texts()), config.batch))


if __name__ == "__main__":
    main()
