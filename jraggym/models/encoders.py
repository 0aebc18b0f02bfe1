"""The families of BERT sentence encoders, and all that sets them apart, in one table.

A family says what is written around a text, which token states become its vector, and how two vectors compare.
Sources: Reimers and Gurevych 2019 and the files of all-MiniLM-L6-v2, which are at hand and checked; and from the papers
and model cards, not checked against the real weights: BGE (arXiv 2309.07597), E5 (2212.03533), Contriever
(2112.09118), SPECTER (2004.07180, trained with the L2 distance), MedCPT (2307.00589, queries of at most 64 tokens).
The papers of BGE, E5 and Contriever fix no form for a title: theirs is that of BM25 here, "title. text". Where
the source sets no shorter limit, a query counts with 64 tokens: rollouts pad every query to its limit.
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from typing import Literal

from jraggym.errors import InputError

Pooling = Literal["mean", "cls"]
Similarity = Literal["cosine", "dot", "euclidean"]
DocumentForm = Literal["text", "sep", "pair"]


@dataclass(frozen=True)
class Family:
    """How texts become vectors, and vectors a ranking."""

    pooling: Pooling = "mean"  # of the last layer: the mean over all tokens, or the state of [CLS]
    similarity: Similarity = "cosine"  # cosine: vectors are scaled to length 1; the others leave them as they are
    query_prefix: str = ""
    document_prefix: str = ""
    document_form: DocumentForm = "text"  # "title. text", "title[SEP]text" in one segment, or a pair of segments
    query_tokens: int = 64  # the most that count, [CLS] and [SEP] included
    document_tokens: int = 512
    towers: int = 1  # 2: queries and documents have weights of their own


BGE_PREFIX = "Represent this sentence for searching relevant passages: "

FAMILIES: dict[str, Family] = {
    "minilm": Family(document_tokens=256),
    "bge": Family(pooling="cls", query_prefix=BGE_PREFIX),
    "e5": Family(query_prefix="query: ", document_prefix="passage: "),
    "contriever": Family(similarity="dot"),
    "specter": Family(pooling="cls", similarity="euclidean", document_form="sep"),
    "medcpt": Family(pooling="cls", similarity="dot", document_form="pair", towers=2),
}
# Names under which models of a family are published; with another name, the family is to be given.
NAMES = {
    "*minilm-l*": "minilm",
    "bge-*-en*": "bge",
    "e5-*": "e5",
    "contriever*": "contriever",
    "specter": "specter",
    "medcpt-*": "medcpt",
}


def family(name: str) -> Family:
    """The family of this name: one of FAMILIES, or a published name such as "BAAI/bge-base-en-v1.5".

    Raises InputError for a name that nothing matches.
    """
    if (found := guess(name)) is None:
        raise InputError("unknown encoder family", got=repr(name), remedy=f"Known: {', '.join(FAMILIES)}.")
    return found


def guess(name: str) -> Family | None:
    """The family that a model's name tells, or None."""
    last = name.lower().rpartition("/")[2]
    matched = (known for pattern, known in NAMES.items() if fnmatch.fnmatchcase(last, pattern))
    return FAMILIES.get(last) or FAMILIES.get(next(matched, ""))
