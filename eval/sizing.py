"""What a corpus of so many passages takes: bytes of each part, and hosts for each way to search it.

    python -m eval.sizing --passages 21000000 1000000000 --dim 768 --ram 256

Prints Markdown. Every number is computed from the formulas below; `tests/test_sizing.py` holds them to the real sizes
of small files and indexes. What none of these can show follows Milvus's documentation and is marked with a star.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import tyro

from jraggym.retrieval.dense import CHUNK

# Measured on 4,330 passages of 60 to 100 words of Wikipedia, cut from the HotpotQA paragraphs as train.chunk cuts
TEXT, TITLE, DISTINCT = 6.12, 20.7, 0.714  # bytes a word, bytes of a title, distinct words (with the title) a word
WORDS, SEEN, HEAPS = 350_308, 29_320, 0.64  # so many words hold so many distinct ones, which grow with this power
USABLE = 0.8  # of a host's memory: the rest is the system's, the encoder's and that of requests under way
PYTHON = 280  # bytes of a Document of three texts and of its place in a Corpus, beside the texts' bytes
WORD = 210  # bytes of a word in BM25's vocabulary
POSTING = 8  # bytes: int32 document, float32 score
PQ_BUDGET, CACHE, DEGREE, SECTOR = 0.125, 0.1, 56, 4_096  # Milvus's defaults of DISKANN
NEIGHBOURS = 32  # M of HNSW


@dataclass(frozen=True)
class Shape:
    """A corpus, as far as sizes go."""

    passages: int
    dim: int
    text: float  # bytes a passage
    title: float
    distinct: float  # words a passage
    vocabulary: float  # words in all


@dataclass(frozen=True)
class Config:
    """Which corpora, on which hosts."""

    passages: tuple[int, ...] = (21_000_000, 1_000_000_000)
    words: int = 100  # a passage
    dim: int = 768  # of the vectors
    ram: float = 256.0  # GB of a host


def like_wikipedia(passages: int, words: int = 100, dim: int = 768) -> Shape:
    """So many passages of so many words of text like Wikipedia's."""
    vocabulary = SEEN * (passages * words / WORDS) ** HEAPS
    return Shape(passages, dim, TEXT * words, TITLE, DISTINCT * words, vocabulary)


# ---------------------------------------------------------------- bytes of each part


def texts_on_disk(shape: Shape) -> float:
    """jsonl, a passage a line: id (the title, "#" and a number), title and text."""
    number = 1.3  # digits of a chunk's number, on average
    return shape.passages * (36 + shape.text + 2 * shape.title + 1 + number)


def corpus_in_memory(shape: Shape) -> float:
    """A `Corpus` of this process."""
    return shape.passages * (PYTHON + shape.text + 2 * shape.title + 2.3)


def vectors(shape: Shape, width: int = 4) -> float:
    """4 bytes a number for f32, 2 for bf16."""
    return width * shape.passages * shape.dim


def codes(shape: Shape, chunk: int = CHUNK) -> float:
    """`DenseIndex` over mapped vectors, held: four bits for two numbers; for each leaf centroids and tables."""
    trees = math.ceil(shape.passages / chunk)
    leaves = trees * math.isqrt(math.ceil(shape.passages / trees))
    return shape.passages * shape.dim / 4 + leaves * (19 * shape.dim + 2_700)


def building(shape: Shape, chunk: int = CHUNK) -> float:
    """What building `DenseIndex` takes beside: copies of one tree's vectors."""
    return 5.5 * 4 * min(shape.passages, chunk) * shape.dim


def bm25(shape: Shape) -> float:
    """`Bm25Index`: a posting for each distinct word of each passage, and the vocabulary."""
    return POSTING * shape.passages * shape.distinct + (WORD + 4) * shape.vocabulary


def hnsw(shape: Shape) -> float:
    """Vectors and graph, as faiss lays them out: 2 M links below, M on each of few levels above."""
    links = 4 * (2 * NEIGHBOURS + NEIGHBOURS / (NEIGHBOURS - 1))
    return shape.passages * (4 * shape.dim + links + 12)


def scann(shape: Shape, clusters: int = 4_096, segment: int = 1_000_000, raw: bool = True) -> float:
    """Milvus's SCANN, which is faiss's IVF-PQ fast scan with four bits for two numbers, beside the raw vectors.

    Lists are padded to 32 codes; each segment of a collection has its own clusters.
    """
    segments = max(1, round(shape.passages / segment))
    code, lists = shape.dim / 4, segments * clusters
    return shape.passages * (code + 8) + lists * (4 * shape.dim + 16 * code) + (vectors(shape) if raw else 0)


def diskann_in_memory(shape: Shape) -> float:
    """Codes and cache by Milvus's default budgets."""
    return (PQ_BUDGET + CACHE) * vectors(shape)


def diskann_on_disk(shape: Shape) -> float:
    """Vector, number of links and links of each node, in whole sectors."""
    node = 4 * shape.dim + 4 + 4 * DEGREE
    nodes = SECTOR // node
    return shape.passages * (SECTOR / nodes if nodes else SECTOR * math.ceil(node / SECTOR))


# ---------------------------------------------------------------- ways to search


def _in_milvus(index: Callable[[Shape], float]) -> Callable[[Shape], float]:
    """Beside the index, Milvus loads the texts and its BM25 index, which has as many postings as ours."""
    return lambda shape: index(shape) + texts_on_disk(shape) + bm25(shape)


@dataclass(frozen=True)
class Way:
    """A way to search: bytes in memory and on disk in all, and the fewest hosts whatever their memory."""

    memory: Callable[[Shape], float]
    disk: Callable[[Shape], float]
    least: Callable[[Shape], int] = lambda shape: 1

    def hosts(self, shape: Shape, ram: float) -> int:
        """How many hosts of `ram` GB it takes."""
        return max(self.least(shape), math.ceil(self.memory(shape) / (USABLE * ram * 1e9)))


WAYS = {
    "this process: BM25 and ScaNN": Way(
        lambda shape: corpus_in_memory(shape) + bm25(shape) + codes(shape) + building(shape),
        lambda shape: texts_on_disk(shape) + vectors(shape),
        lambda shape: math.ceil(shape.passages * shape.distinct / 2**31),  # bm25s counts its postings in int32
    ),
    "Milvus FLAT*": Way(_in_milvus(vectors), _in_milvus(vectors)),
    "Milvus HNSW*": Way(_in_milvus(hnsw), _in_milvus(lambda shape: vectors(shape) + hnsw(shape))),
    "Milvus SCANN*": Way(_in_milvus(scann), _in_milvus(lambda shape: vectors(shape) + scann(shape))),
    "Milvus DISKANN*": Way(
        _in_milvus(diskann_in_memory),
        _in_milvus(lambda shape: vectors(shape) + diskann_on_disk(shape)),
    ),
}

PARTS: dict[str, Callable[[Shape], float]] = {
    "texts, jsonl": texts_on_disk,
    "texts, in a Python process": corpus_in_memory,
    "vectors, f32": vectors,
    "vectors, bf16": lambda shape: vectors(shape, 2),
    "ScaNN codes": codes,
    "BM25 index": bm25,
    "Milvus SCANN": scann,
    "Milvus DISKANN, in memory*": diskann_in_memory,
    "Milvus DISKANN, on disk*": diskann_on_disk,
}


def table(config: Config) -> str:
    """Both tables in Markdown: the parts in GB, and the ways with memory, disk and hosts."""
    shapes = [like_wikipedia(passages, config.words, config.dim) for passages in config.passages]
    names = [f"{shape.passages / 1e6:,.0f} M passages" for shape in shapes]
    lines = [f"| GB, {config.words} words and {config.dim} numbers a passage | {' | '.join(names)} |"]
    lines.append("|---" * (1 + len(shapes)) + "|")
    for part, size in PARTS.items():
        lines.append(f"| {part} | {' | '.join(f'{size(shape) / 1e9:,.1f}' for shape in shapes)} |")
    heads = [f"{name}: memory | disk | hosts | each" for name in names]
    lines += ["", f"| in GB, with {config.ram:g} GB of memory a host | {' | '.join(heads)} |"]
    lines.append("|---" * (1 + 4 * len(shapes)) + "|")
    for name, way in WAYS.items():
        cells = []
        for shape in shapes:
            count, memory = way.hosts(shape, config.ram), way.memory(shape) / 1e9
            cells += [f"{memory:,.0f}", f"{way.disk(shape) / 1e9:,.0f}", f"{count:,}", f"{memory / count:,.0f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    print(table(tyro.cli(Config, description=__doc__)))


if __name__ == "__main__":
    main()
