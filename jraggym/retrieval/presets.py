"""The retrievers of RAG-Gym as presets, and which benchmark uses which.

    retriever = preset_retriever("rrf_bge", corpus, "models/bge-base-en-v1.5", vectors="vectors")

RAG-Gym fuses BM25 with a dense ranking by reciprocal rank: 32 documents a search, of 100 candidates each way. It names
presets for HotpotQA, 2WikiMultihopQA, Bamboogle and MedQA; those of MuSiQue and PubMedQA follow by their corpora.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from jraggym.errors import InputError
from jraggym.models.bert_encoder import BertEncoder
from jraggym.retrieval.corpus import Corpus
from jraggym.retrieval.hybrid import HybridRetriever
from jraggym.retrieval.vectors import stored_vectors


@dataclass(frozen=True)
class Preset:
    """BM25 and one encoder, fused by rank, and the benchmarks that are searched this way."""

    encoder: str  # published name of the queries' tower, or of both
    benchmarks: tuple[str, ...]
    documents: str | None = None  # published name of the documents' tower, where it has weights of its own
    k: int = 32  # documents a search
    depth: int = 100  # candidates of each ranking
    constant: int = 60  # of reciprocal rank fusion


PRESETS = {
    "rrf_bge": Preset("BAAI/bge-base-en-v1.5", ("hotpotqa", "twowiki", "musique", "bamboogle")),
    "rrf_2": Preset("ncbi/MedCPT-Query-Encoder", ("medqa", "pubmedqa"), documents="ncbi/MedCPT-Article-Encoder"),
}


def preset_of(benchmark: str) -> str:
    """The name of a benchmark's preset; raises InputError for an unknown benchmark."""
    for name, preset in PRESETS.items():
        if benchmark in preset.benchmarks:
            return name
    known = ", ".join(name for preset in PRESETS.values() for name in preset.benchmarks)
    raise InputError("no preset for this benchmark", got=repr(benchmark), remedy=f"Known: {known}.")


def preset_retriever(
    name: str,
    corpus: Corpus,
    folder: str | Path,
    documents: str | Path | None = None,
    *,
    vectors: str | Path | None = None,
) -> HybridRetriever:
    """Builds the retriever of a preset over a corpus.

    Args:
      folder: the encoder's weights, or those of its queries' tower.
      documents: the weights of the documents' tower, where it has its own and they are not in `folder`.
      vectors: where the corpus's vectors are kept, made once and gone on with after a kill; None: in memory.

    Raises:
      InputError: for an unknown preset, and as `BertEncoder.load` and `stored_vectors` do.
    """
    if name not in PRESETS:
        raise InputError("unknown preset", got=repr(name), remedy=f"Use one of {', '.join(PRESETS)}.")
    preset = PRESETS[name]
    encoder = BertEncoder.load(folder, preset.encoder, documents)
    made = None if vectors is None else stored_vectors(vectors, encoder.document, corpus.documents)
    return HybridRetriever(corpus, encoder, preset.k, preset.depth, vectors=made, constant=preset.constant)
