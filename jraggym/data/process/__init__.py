"""Process data: labelled states, collected into chunks that survive a kill, published as an ArrayRecord dataset.

questions -> ChunkStore (one jsonl file a chunk) -> build_dataset (tensorflow-datasets) -> batches (grain)
"""

from jraggym.data.process.chunks import ChunkStore
from jraggym.data.process.dataset import ProcessSource, batches, build_dataset, open_dataset
from jraggym.data.process.record import ProcessRecord, Provenance, record_from_json

__all__ = [
    "ChunkStore",
    "ProcessRecord",
    "ProcessSource",
    "Provenance",
    "batches",
    "build_dataset",
    "open_dataset",
    "record_from_json",
]
