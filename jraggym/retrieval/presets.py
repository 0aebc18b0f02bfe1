"""The retrievers of RAG-Gym as presets, and which benchmark uses which.

    retriever = preset_retriever("rrf_bge", corpus, "models/bge-base-en-v1.5", vectors="vectors")
    on_a_server = preset_retriever("rrf_bge", corpus, "models/bge-base-en-v1.5", milvus=Milvus("http://milvus:19530"))

RAG-Gym fuses BM25 with a dense ranking by reciprocal rank: 32 documents a search, of 100 candidates each way. It names
presets for HotpotQA, 2WikiMultihopQA, Bamboogle and MedQA; those of MuSiQue and PubMedQA follow by their corpora.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jraggym.errors import InputError
from jraggym.models.bert_encoder import BertEncoder
from jraggym.retrieval.corpus import Corpus
from jraggym.retrieval.encoder import Encoder, embed
from jraggym.retrieval.hybrid import HybridRetriever
from jraggym.retrieval.milvus import MilvusRetriever
from jraggym.retrieval.milvus_collection import Milvus
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
    milvus: Milvus | None = None,
) -> HybridRetriever | MilvusRetriever:
    """Builds the retriever of a preset over a corpus, in this process or on a Milvus server.

    Args:
      folder: the encoder's weights, or those of its queries' tower.
      documents: the weights of the documents' tower, where it has its own and they are not in `folder`.
      vectors: where the corpus's vectors are kept, made once and gone on with after a kill; None: in memory.
      milvus: the collection that holds the corpus, or is to hold it; an empty corpus takes it as it is.

    Raises:
      InputError: for an unknown preset, and as `BertEncoder.load`, `stored_vectors` and `MilvusRetriever` do.
    """
    if name not in PRESETS:
        raise InputError("unknown preset", got=repr(name), remedy=f"Use one of {', '.join(PRESETS)}.")
    preset = PRESETS[name]
    encoder = BertEncoder.load(folder, preset.encoder, documents)
    return fused(encoder, corpus, preset.k, preset.depth, preset.constant, vectors=vectors, milvus=milvus)


def fused(
    encoder: Encoder,
    corpus: Corpus,
    k: int = 32,
    depth: int = 100,
    constant: int = 60,
    *,
    vectors: str | Path | None = None,
    milvus: Milvus | None = None,
) -> HybridRetriever | MilvusRetriever:
    """The same for any encoder: BM25 and its vectors, fused by rank as the presets are."""

    def made() -> np.ndarray:
        if vectors is None:
            return embed(encoder.document, corpus.documents)
        return stored_vectors(vectors, encoder.document, corpus.documents)

    if milvus is None:
        return HybridRetriever(corpus, encoder, k, depth, vectors=made(), constant=constant)
    held = corpus.documents or None
    return MilvusRetriever(milvus, encoder, k, depth, corpus=held, vectors=made, constant=constant)
