"""How much memory the index of memory-mapped vectors takes, and what its recall is against exact search.

    python tests/benchmarks/retrieval_memory.py [--documents 200000]

The vectors are written to a file, and a process of its own indexes and searches them; its resident memory counts from
after the imports on, and includes the pages of the file that are mapped in. Measured on two CPU cores with 64 queries:

    200,000 vectors of 384, 307 MB    at most 414 MB while trees are built, 35 MB held, recall@10 1.000
    100,000, --chunk 5000, 154 MB     at most 68 MB, recall@10 .942

Building takes about 5.5 times the vectors of one tree, however many trees there are. Nothing is asserted: the figures
depend on the machine.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

ROOT = Path(__file__).resolve().parents[2]
K = 10
SCRIPT = """
import json, sys, time
import numpy as np
from jraggym.retrieval import dense

def memory(what):  # bytes; not by getrusage, which also counts what the parent had before this program began
    return 1024 * int(next(l for l in open("/proc/self/status") if l.startswith(what)).split()[1])

def peak():
    return memory("VmHWM")

folder, chunk = sys.argv[1], int(sys.argv[2])
if chunk:
    dense.CHUNK, dense.TREE_FROM = chunk, chunk // 2
queries = np.load(f"{folder}/queries.npy")
before, start = peak(), time.perf_counter()
index = dense.DenseIndex(np.load(f"{folder}/vectors.npy", mmap_mode="r"))
built, middle = peak(), time.perf_counter()
found = np.concatenate([index.search(queries[i : i + 32], 10) for i in range(0, len(queries), 32)])
searched, end = peak(), time.perf_counter()
resident = memory("VmRSS")
np.save(f"{folder}/found.npy", found)
print(json.dumps({
    "building": built - before, "searching": searched - before, "held": resident - before,
    "seconds": middle - start, "rate": len(queries) / (end - middle),
}))
"""


@dataclass(frozen=True)
class Config:
    """Sizes of the synthetic data."""

    documents: int = 200_000
    dim: int = 384
    queries: int = 256
    chunk: int = 0  # vectors of one tree; 0: as it is


def write_clustered(folder: Path, config: Config, clusters: int = 500) -> None:
    """Unit vectors around random centres, the noise 1.5 times as long as a centre, written part by part."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(clusters, config.dim)).astype(np.float32)

    def draw(count: int) -> np.ndarray:
        made = centres[rng.integers(clusters, size=count)] + 1.5 * rng.normal(size=(count, config.dim))
        return (made / np.linalg.norm(made, axis=1, keepdims=True)).astype(np.float32)

    shape = (config.documents, config.dim)
    vectors = np.lib.format.open_memmap(folder / "vectors.npy", mode="w+", dtype=np.float32, shape=shape)
    for start in range(0, config.documents, 10_000):
        vectors[start : start + 10_000] = draw(len(vectors[start : start + 10_000]))
    vectors.flush()
    np.save(folder / "queries.npy", draw(config.queries))


def exact(vectors: np.ndarray, queries: np.ndarray, k: int) -> np.ndarray:
    """The k best positions [Q, k] by inner product, part by part, in no order."""
    best, scores = np.zeros((len(queries), 0), np.int64), np.zeros((len(queries), 0), np.float32)
    for start in range(0, len(vectors), 10_000):
        part = queries @ vectors[start : start + 10_000].T
        best = np.concatenate([best, np.broadcast_to(np.arange(start, start + part.shape[1]), part.shape)], axis=1)
        scores = np.concatenate([scores, part], axis=1)
        kept = np.argpartition(-scores, k - 1, axis=1)[:, :k]
        best, scores = np.take_along_axis(best, kept, axis=1), np.take_along_axis(scores, kept, axis=1)
    return best


def measure(folder: Path, config: Config) -> dict[str, float]:
    """Bytes while building, at the most until the last search, and held then; seconds, queries a second and recall."""
    write_clustered(folder, config)
    command = [sys.executable, "-c", SCRIPT, str(folder), str(config.chunk)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(done.stderr)
    found, queries = np.load(folder / "found.npy"), np.load(folder / "queries.npy")
    truth = exact(np.load(folder / "vectors.npy", mmap_mode="r"), queries, K)
    shared = [len(np.intersect1d(a, b)) / K for a, b in zip(found, truth, strict=True)]
    return {**json.loads(done.stdout), "recall": float(np.mean(shared))}


def main() -> None:
    config = tyro.cli(Config, description=__doc__)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), config)
    mega = {name: round(found[name] / 1e6) for name in ("building", "searching", "held")}
    size = round(4 * config.documents * config.dim / 1e6)
    print(f"{config.documents:,} vectors of {config.dim}: {size} MB on disk, as f32")
    print(f"built in {found['seconds']:.0f} s with at most {mega['building']} MB more in memory")
    print(
        f"searched with at most {mega['searching']} MB, of which {mega['held']} MB stay; {found['rate']:,.0f} queries/s"
    )
    print(f"recall@{K} {found['recall']:.4f}")


if __name__ == "__main__":
    main()
