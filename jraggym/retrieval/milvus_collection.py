"""A corpus in a collection of Milvus: made once, gone on with after a kill, and never taken for another corpus's.

    position   int64, the key: the document's place in the corpus, so that writing it again changes nothing
    document   its id
    title      its title
    content    title and text, which Milvus's own BM25 function indexes
    vector     f32 [D] of the encoder's document tower
    words      what the BM25 function makes of the content

The collection's properties hold digits that stand for the corpus and for the encoder, and the number of documents.
A file ending in .db instead of a server's address is milvus-lite, an embedded Milvus of one process at a time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import tenacity
from tqdm import tqdm

from jraggym.errors import InputError
from jraggym.retrieval.corpus import written
from jraggym.retrieval.encoder import Encoder, embed
from jraggym.retrieval.vectors import fingerprint
from jraggym.types import Document

Index = Literal["AUTOINDEX", "FLAT", "IVF_FLAT", "HNSW", "SCANN", "DISKANN"]
BATCH = 1_000  # documents a write: what a kill costs at most
LEAST_CANDIDATES, CANDIDATES = 128, 4  # that an approximate index scores: at least, and a multiple of k
PROBED = 0.5  # of the clusters of IVF_FLAT and SCANN
PACE = ("concurrency", "timeout", "patience", "attempts")  # settings that decide nothing of what is found
_TEXT = 65_535  # bytes: the most that Milvus keeps of a text
_METRIC = {"cosine": "IP", "dot": "IP", "euclidean": "L2"}  # vectors of cosine encoders are of unit length
_CHANNEL = {"grpc.keepalive_time_ms": 330_000}  # a server of gRPC's own settings cuts off who pings every five minutes
_NO_CONNECTION = 2  # pymilvus's code
_SLOW = ("load_collection", "flush")  # requests
_CORPUS, _ENCODER, _SIZE = "jraggym.corpus", "jraggym.encoder", "jraggym.documents"


@dataclass(frozen=True)
class Milvus:
    """Where a collection is, how its vectors are indexed when it is made, and how hard the server may be pressed."""

    uri: str = "http://localhost:19530"
    """A server, or a file ending in .db for embedded milvus-lite."""
    collection: str = "jraggym"
    token_variable: str | None = None
    """The environment variable that holds the token, or "user:password"; none: no token is sent."""
    index: Index = "AUTOINDEX"
    """Of the vectors, where the collection is made here. milvus-lite has no SCANN and no DISKANN."""
    filter: str = ""
    """Only what matches counts: a Milvus expression over document, title and content, as in title like "A%"."""
    concurrency: int = 8
    """Requests under way at once."""
    timeout: float = 10.0
    """Seconds for a request."""
    patience: float = 600.0
    """Seconds for the server to load a collection, or to write all of it to its disks."""
    attempts: int = 3
    """At a request that fails in passing."""


class Collection:
    """A connection to one collection, whether it is there or not; requests are retried where that can help."""

    def __init__(self, milvus: Milvus):
        """Raises InputError when a setting cannot be, pymilvus is not installed, or no server answers."""
        if milvus.index not in get_args(Index):
            raise InputError("unknown index", got=repr(milvus.index), remedy=f"Known: {', '.join(get_args(Index))}.")
        if min(milvus.concurrency, milvus.attempts, milvus.timeout, milvus.patience) <= 0:
            remedy = "Raise concurrency, attempts, timeout and patience above 0."
            raise InputError("requests must be possible", got=milvus, remedy=remedy)
        try:
            import pymilvus  # here: an extra, which starts logging and reads a file .env
        except ImportError as error:
            remedy = "Run pip install 'jraggym[milvus]'."
            raise InputError("Milvus needs the package pymilvus", got=error, remedy=remedy) from error
        for name in ("pymilvus", "milvus_lite", "grpc._server"):  # the last is of milvus-lite
            logging.getLogger(name).setLevel(logging.CRITICAL)  # their errors come as exceptions as well
        self.milvus = milvus
        token = "" if milvus.token_variable is None else os.environ.get(milvus.token_variable, "")
        if milvus.token_variable is not None and not token:
            remedy = "Put the token there, or name another variable."
            raise InputError("there is no token", got=f"{milvus.token_variable} is not set", remedy=remedy)
        try:
            named = {"uri": milvus.uri, "token": token, "timeout": milvus.timeout, "grpc_options": _CHANNEL}
            self._client = _retrying(milvus)(pymilvus.MilvusClient, **named)
        except Exception as error:  # pymilvus raises its own, grpc's and plain ones
            remedy = "Start the server, or name another one; one process at a time can open a .db file."
            raise InputError(f"no Milvus answers at {milvus.uri}", got=reason(error), remedy=remedy) from error

    def request(self, name: str, **named: Any) -> Any:
        """One request about this collection; raises what pymilvus does when the last attempt fails."""
        timeout = self.milvus.patience if name in _SLOW else self.milvus.timeout
        return _retrying(self.milvus)(getattr(self._client, name), self.milvus.collection, timeout=timeout, **named)

    def close(self) -> None:
        """Ends the connection."""
        self._client.close()

    def make(
        self,
        encoder: Encoder,
        documents: Sequence[Document],
        vectors: Callable[[], np.ndarray] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Writes the documents and their vectors, once; a killed call is gone on with when called again.

        One job writes at a time. Without `progress`, which is told the number of documents done, a bar shows on stderr.

        Args:
          vectors: gives the documents' f32 [n, D], and is called when there is something to write; by default `embed`.

        Raises:
          InputError: when there is no document, the collection holds something else, there is not one vector of the
            encoder's width a document, a text is too long for Milvus, or the server refuses.
        """
        if not len(documents):
            raise InputError("a collection needs documents", got="none", remedy="Give at least one document.")
        try:
            if not self.request("has_collection"):
                self._create(encoder, documents)
            self.check(encoder, documents)
            if (there := self.count()) < len(documents):
                made = embed(encoder.document, documents) if vectors is None else vectors()
                if made.shape != (want := (len(documents), encoder.document.dim)):
                    remedy = "Give one vector per document, of the encoder's width."
                    raise InputError(f"a collection needs vectors {list(want)}", got=list(made.shape), remedy=remedy)
                first = there // BATCH * BATCH  # a batch that is there in part is written again
                self._write(documents, made, first, progress)
                self.request("flush")
        except InputError:
            raise
        except Exception as error:
            raise self._refused(error) from error

    def check(self, encoder: Encoder, documents: Sequence[Document] | None = None) -> int:
        """Gives the number of documents that the collection is to hold.

        Raises InputError when it is not there, holds another corpus, or vectors of another encoder, width or metric.
        """
        name = self.milvus.collection
        if not self.request("has_collection"):
            remedy = "Name one that is there, or give the corpus to make it."
            raise InputError(f"Milvus has no collection {name}", got=self.milvus.uri, remedy=remedy)
        found = self.request("describe_collection")
        properties, remedy = found.get("properties", {}), "Name another collection."
        if _SIZE not in properties:
            raise InputError(f"the collection {name} was not made here", got="no digits of a corpus", remedy=remedy)
        widths = {field["name"]: field["params"].get("dim") for field in found["fields"]}
        for what, got, want in (
            ("vectors of another width", widths["vector"], encoder.document.dim),
            ("vectors of another metric", self.index()["metric_type"], _METRIC[encoder.similarity]),
            ("vectors of another encoder", properties[_ENCODER], fingerprint(encoder.document, ())),
            ("another corpus", properties[_CORPUS], None if documents is None else corpus_digits(documents)),
        ):
            if want is not None and str(got) != str(want):
                raise InputError(f"the collection {name} holds {what}", got=f"{got} and not {want}", remedy=remedy)
        return int(properties[_SIZE])

    def count(self) -> int:
        """How many documents are there; the collection is loaded for it."""
        self.request("load_collection")
        found = self.request("query", output_fields=["count(*)"], consistency_level="Strong")
        return int(found[0]["count(*)"])

    def index(self) -> dict[str, Any]:
        """What the server tells of the index of the vectors."""
        return self.request("describe_index", index_name="vector")

    def _create(self, encoder: Encoder, documents: Sequence[Document]) -> None:
        from pymilvus import DataType, Function, FunctionType, MilvusClient

        index, name = self.milvus.index, self._client.get_server_version()
        if index in ("SCANN", "DISKANN") and name.startswith("milvus_lite"):  # it takes them, and cannot load them
            raise InputError("milvus-lite has no such index", got=index, remedy="Use FLAT, HNSW or a server.")
        schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field("position", DataType.INT64, is_primary=True)
        schema.add_field("document", DataType.VARCHAR, max_length=_TEXT)
        schema.add_field("title", DataType.VARCHAR, max_length=_TEXT)
        schema.add_field("content", DataType.VARCHAR, max_length=_TEXT, enable_analyzer=True)
        schema.add_field("vector", DataType.FLOAT_VECTOR, dim=encoder.document.dim)
        schema.add_field("words", DataType.SPARSE_FLOAT_VECTOR)
        bm25 = {"input_field_names": ["content"], "output_field_names": ["words"]}
        schema.add_function(Function(name="bm25", function_type=FunctionType.BM25, **bm25))
        indexes = MilvusClient.prepare_index_params()
        metric, params = _METRIC[encoder.similarity], built(index, len(documents))
        indexes.add_index("vector", index, "vector", metric_type=metric, params=params)
        lucene = {"bm25_k1": 1.2, "bm25_b": 0.75}
        indexes.add_index("words", "SPARSE_INVERTED_INDEX", "words", metric_type="BM25", params=lucene)
        size, tower = str(len(documents)), fingerprint(encoder.document, ())
        properties = {_CORPUS: corpus_digits(documents), _ENCODER: tower, _SIZE: size}
        self.request("create_collection", schema=schema, index_params=indexes, properties=properties)

    def _write(self, documents: Sequence[Document], vectors: np.ndarray, first: int, progress) -> None:
        with tqdm(
            total=len(documents), initial=first, desc="to Milvus", unit="text", file=sys.stderr, disable=bool(progress)
        ) as bar:
            tell = progress or (lambda count: bar.update(count - bar.n))
            for start in range(first, len(documents), BATCH):
                rows = range(start, min(start + BATCH, len(documents)))
                self.request("upsert", data=[_row(i, documents[i], vectors[i]) for i in rows])
                tell(rows.stop)

    def _refused(self, error: Exception) -> InputError:
        remedy = "Servers before 2.5 have no BM25; otherwise look into the server's log."
        return InputError(f"{self.milvus.uri} refuses a collection", got=reason(error), remedy=remedy)


def searched(index: str, size: int, k: int) -> dict[str, int]:
    """The parameters of a search for the k best of `size` vectors in an index of this type."""
    candidates = max(CANDIDATES * k, LEAST_CANDIDATES)
    probes = math.ceil(PROBED * _clusters(size))
    return {
        "IVF_FLAT": {"nprobe": probes},
        "HNSW": {"ef": candidates},
        "SCANN": {"nprobe": probes, "reorder_k": candidates},
        "DISKANN": {"search_list": candidates},
    }.get(index, {})


def built(index: str, size: int) -> dict[str, Any]:
    """The parameters that an index of this type is built with."""
    return {
        "IVF_FLAT": {"nlist": _clusters(size)},
        "SCANN": {"nlist": _clusters(size), "with_raw_data": True},  # raw, to score the candidates exactly
        "HNSW": {"M": 32, "efConstruction": 200},
    }.get(index, {})


def _clusters(size: int) -> int:
    """Of IVF_FLAT and SCANN; Milvus cuts a large collection into segments, each of which has so many."""
    return max(1, min(4 * math.isqrt(size), 4_096))


def corpus_digits(documents: Sequence[Document]) -> str:
    """Sixteen hex digits that tell documents and their order from others."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(json.dumps([document.id, document.title, document.text]).encode())
    return digest.hexdigest()[:16]


def plain(text: str) -> str:
    """A text as UTF-8 can carry it: a lone surrogate becomes a question mark."""
    return text.encode("utf-8", "replace").decode()


def _row(position: int, document: Document, vector: np.ndarray) -> dict[str, Any]:
    texts = {"document": document.id, "title": document.title, "content": written(document)}
    texts = {name: plain(text) for name, text in texts.items()}
    for name, text in texts.items():
        if (size := len(text.encode())) > _TEXT:
            got, remedy = f"{size} bytes of {document.id!r}", "Cut the documents with train.chunk."
            raise InputError(f"Milvus keeps {_TEXT} bytes of a {name}", got=got, remedy=remedy)
    return {"position": position, **texts, "vector": np.asarray(vector, np.float32)}


def _retrying(milvus: Milvus) -> tenacity.Retrying:
    """Again after a passing failure, the wait doubled each time, with jitter."""
    return tenacity.Retrying(
        retry=tenacity.retry_if_exception(_passing),
        stop=tenacity.stop_after_attempt(milvus.attempts),
        wait=tenacity.wait_random_exponential(0.2, max=milvus.timeout),
        reraise=True,
    )


def _passing(error: BaseException) -> bool:
    """Whether the same request may succeed later: no answer, too late an answer, or too many requests."""
    import grpc

    code = error.code() if isinstance(error, grpc.RpcError) else getattr(error, "code", None)
    status = grpc.StatusCode
    passing = (status.UNAVAILABLE, status.DEADLINE_EXCEEDED, status.RESOURCE_EXHAUSTED, status.ABORTED)
    return code in (*passing, _NO_CONNECTION) or getattr(error, "retriable", False)


def reason(error: BaseException) -> str:
    """What an error says, on one line."""
    return " ".join(str(getattr(error, "message", "") or error).split()) or type(error).__name__
