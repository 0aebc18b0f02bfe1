"""The environment with Gymnasium's face: `reset` and `step` around the pure transition and a retriever.

environment = jraggym.make("synthhop")
state, info = environment.reset(environment.examples[0])
state, reward, terminated, truncated, info = environment.step("<search>the mayor of Tarvan</search>")
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jraggym.environment import outcome, transition, wants_retrieval
from jraggym.errors import InputError
from jraggym.retrieval.guard import guarded
from jraggym.text.actions import parse_action
from jraggym.types import Action, Answer, Document, Example, Malformed, Search, State

if TYPE_CHECKING:  # the heavy parts are imported by `make`
    from jraggym.retrieval.encoder import Encoder

Retriever = Callable[[Sequence[str]], Sequence[Sequence[Document]]]  # queries -> documents of each, best first

DATASETS = ("synthhop",)
RETRIEVERS = ("hybrid", "bm25", "dense")
ENCODERS = ("tfidf", "minilm")


class Environment:
    """One episode at a time over `retriever`; `examples` are what `reset` draws from when it gets no question.

    An episode lasts at most `max_turns` steps, the last of which never searches. A retriever that raises, answers
    nonsense or takes more than `timeout` seconds gives a turn with an `error` and no documents.
    """

    def __init__(
        self, retriever: Retriever, examples: Sequence[Example] = (), *, max_turns: int = 5, timeout: float = 30.0
    ):
        if max_turns < 1 or timeout <= 0:
            raise InputError(
                "an episode needs a turn and some time",
                got=f"max_turns={max_turns}, timeout={timeout}",
                remedy="Use max_turns >= 1 and timeout > 0 seconds.",
            )
        self.examples = tuple(examples)
        self.max_turns, self.timeout = max_turns, timeout
        self._retriever = retriever
        self._rng = random.Random(0)
        self._state: State | None = None
        self._example: Example | None = None
        self._searches = 0

    def reset(self, question: str | Example | None = None, *, seed: int | None = None) -> tuple[State, dict[str, Any]]:
        """Starts an episode and returns (state, info); None draws one of `examples`, from `seed` on if given.

        A plain string has no gold answer, so its episode earns no reward. Raises InputError for a blank question,
        or when there is nothing to draw from.
        """
        if seed is not None:
            self._rng.seed(seed)
        if question is None:
            if not self.examples:
                raise InputError("this environment has no examples to draw", got="None", remedy="Pass a question.")
            question = self._rng.choice(self.examples)
        text = question.question if isinstance(question, Example) else question
        if not text.strip():
            raise InputError("the question is blank", got=repr(text), remedy="Give it a text.")
        self._example = question if isinstance(question, Example) else None
        self._state, self._searches = State(text), 0
        return self._state, self._info(None, (), None)

    def step(self, action: Action | str) -> tuple[State, float, bool, bool, dict[str, Any]]:
        """Executes an action, or a model output read by `parse_action`, and returns Gymnasium's five values.

        (state, reward, terminated, truncated, info): the reward is the exact match of an answer with the gold and
        0.0 otherwise. Raises RuntimeError before `reset` and after the end of the episode, InputError when the
        action is of no known type.
        """
        state = self._open_state()
        if isinstance(action, str):
            action = parse_action(action)
        if not isinstance(action, Search | Answer | Malformed):
            raise InputError("unknown action", got=type(action).__name__, remedy="Use Search, Answer or a string.")
        documents: tuple[Document, ...] = ()
        error = None
        if isinstance(action, Search) and wants_retrieval(state, action, self.max_turns):
            self._searches += 1
            documents, error = _retrieve(self._retriever, action.query, self.timeout)
        state = transition(state, action, documents, error, max_turns=self.max_turns)
        self._state = state
        info = self._info(action, documents, error)
        return state, info.get("em", 0.0), state.answer is not None, state.truncated, info

    def _open_state(self) -> State:
        if self._state is None:
            raise RuntimeError("step before reset: call reset(question) first")
        if self._state.done:
            raise RuntimeError("step after the end of the episode: call reset(question) to start another")
        return self._state

    def _info(self, action: Action | None, documents: tuple[Document, ...], error: str | None) -> dict[str, Any]:
        assert self._state is not None
        info: dict[str, Any] = {
            "action": action,
            "documents": documents,
            "error": error,
            "searches": self._searches,
            "malformed": sum(isinstance(turn.action, Malformed) for turn in self._state.turns),
        }
        if self._state.done and self._example is not None:
            info |= outcome(self._state, self._example)
        return info


def _retrieve(retriever: Retriever, query: str, timeout: float) -> tuple[tuple[Document, ...], str | None]:
    """(documents, error) of one query; never raises and never hangs."""

    def call() -> tuple[Document, ...]:
        (found,) = retriever([query])
        documents = tuple(found)
        if not all(isinstance(document, Document) for document in documents):
            raise TypeError("the retriever returned something else than documents")
        return documents

    documents, error = guarded(call, timeout)
    return documents or (), error


def make(
    dataset: str | Path = "synthhop",
    *,
    split: str = "train",
    seed: int = 0,
    retriever: str = "hybrid",
    encoder: str | Path = "tfidf",
    max_turns: int = 5,
    documents: int = 2,
    timeout: float = 30.0,
) -> Environment:
    """An `Environment` over a generated world or over a corpus of your own.

    `dataset` is "synthhop" (its `split` and `seed` give documents and examples) or the path of a JSON-lines corpus,
    which has no examples. `retriever` is "bm25", "dense" or their fusion "hybrid"; `encoder`, unused by "bm25", is
    "tfidf", "minilm" or the path of a BERT folder. A search brings `documents` documents.
    Raises InputError for an unknown name or a missing file.
    """
    _known("retriever", retriever, RETRIEVERS)
    _known_or_path("dataset", dataset, DATASETS)
    _known_or_path("encoder", encoder, ENCODERS)
    from jraggym.data.synthhop import make_world
    from jraggym.retrieval.corpus import Corpus
    from jraggym.retrieval.hybrid import HybridRetriever

    examples: tuple[Example, ...] = ()
    if dataset == "synthhop":
        world = make_world(split, seed)
        corpus, examples = Corpus.from_documents(world.documents), world.examples
    else:
        corpus = Corpus.from_jsonl(dataset)
    encode = None if retriever == "bm25" else _encoder(encoder, corpus.texts())
    search = HybridRetriever(corpus, encode, documents, lexical=retriever != "dense")
    return Environment(search, examples, max_turns=max_turns, timeout=timeout)


def _encoder(name: str | Path, texts: Sequence[str]) -> Encoder:
    from jraggym.models.bert_encoder import BertEncoder, minilm_path
    from jraggym.retrieval.encoder import TfidfEncoder

    if name == "tfidf":
        return TfidfEncoder.fit(texts)
    return BertEncoder.load(minilm_path() if name == "minilm" else name)


def _known(what: str, name: object, known: tuple[str, ...], also: str = "") -> None:
    if name not in known:
        raise InputError(f"unknown {what}", got=repr(str(name)), remedy=f"Known: {', '.join(known)}{also}.")


def _known_or_path(what: str, name: str | Path, known: tuple[str, ...]) -> None:
    if not Path(name).exists():
        _known(what, name, known, also=", or an existing path")
