"""A world small enough to script: six documents, and a tokenizer whose tokens add up to whole actions."""

import threading
import zlib

from jraggym.retrieval.corpus import Corpus
from jraggym.retrieval.encoder import TfidfEncoder
from jraggym.retrieval.hybrid import HybridRetriever
from jraggym.text.batching import Codec
from jraggym.types import Document, Example

# Each query of ACTIONS shares words with two texts or more: where all similarities are 0, rounding would rank.
TEXTS = (
    "The river Tarvan rises in the hills of Morn, far from the coast.",
    "Morn is a hill town; its mayor is Ada Lindqvist.",
    "Ada Lindqvist was born in Port Selby and wrote novels.",
    "Port Selby has a harbour, a museum and a fish market.",
    "A novel is a long work of fiction, kept in a museum.",
    "Hills and rivers shape the weather of the coast.",
)
ACTIONS = (
    "<search> Morn mayor</search>",
    "<search> harbour museum</search>",
    "<search> Ada novels</search>",
    "<answer> Port Selby</answer>",
    "no action at all",
    "<search> coast weather</search>",
    "<answer> Morn</answer>",
)
STOP_IDS = {"</search>": 1, "</answer>": 2}


class ToyTokenizer:
    """Decodes any ids to one of `actions`, by their sum; encodes each word to one of the upper ids."""

    vocab_size, pad_id = 16, 0

    def __init__(self, actions=ACTIONS):
        self.actions = actions

    def token_id(self, piece):
        return STOP_IDS[piece]

    def encode(self, segments):
        return [[3 + zlib.crc32(word.encode()) % 13 for word in segment.split()] for segment in segments]

    def decode(self, ids):
        return [self.actions[sum(row) % len(self.actions)] for row in ids]


class Watched:
    """A retriever that notes the queries of every search; `fault` may stand in for the search of call number n."""

    def __init__(self, retriever, fault=None):
        self._retriever, self._fault, self._lock = retriever, fault, threading.Lock()
        self.calls = []
        self.params, self.tokenize, self.encode = retriever.params, retriever.tokenize, retriever.encode

    def search(self, queries, vectors, k=None):
        with self._lock:
            number = len(self.calls)
            self.calls.append(list(queries))
        found = self._retriever.search(queries, vectors, k)
        return found if self._fault is None else self._fault(number, found)


def toy_retriever():
    corpus = Corpus.from_documents(Document(f"d{i}", f"Title {i}", text) for i, text in enumerate(TEXTS))
    return HybridRetriever(corpus, TfidfEncoder.fit(corpus.texts(), dim=6), k=2)


def toy_codec(max_turns=4, actions=ACTIONS):
    return Codec(ToyTokenizer(actions), max_turns, 96)


def toy_examples(count):
    return tuple(Example(f"e{i}", f"where is thing {i}", ("Port Selby",), support=("d1", "d2")) for i in range(count))
