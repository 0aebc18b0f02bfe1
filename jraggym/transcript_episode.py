"""One episode that is a growing transcript, whoever draws its turns: read a turn, retrieve, append ids, go on or end.

    episode = OpenEpisode.start(rules, 0, example, prompt, may_search)
    whole = None
    while whole is None:
        ids, logprob = ...                      a turn of at most `episode.room` tokens behind `episode.transcript`
        query = episode.act(ids, logprob, text)                 what is to be retrieved, or ""
        whole = episode.observe(documents, error)               the whole episode, or None where a turn follows

Ids are appended and never made from text again, so what a trainer reads is what the policy was fed. No jax here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from jraggym.clock import spent
from jraggym.episodes import Retriever
from jraggym.errors import InputError
from jraggym.protocols.protocol import Protocol, observation
from jraggym.protocols.reading import final_answer, read_action
from jraggym.retrieval.guard import guarded
from jraggym.text.stop_strings import StopTable, stop_table, token_texts
from jraggym.text.tokenizer import Tokenizer
from jraggym.transcripts import Transcript
from jraggym.types import Action, Answer, Document, Example, Malformed, Piece, Search, Segment

Documents = tuple[Document, ...]
Digest = Callable[[str, str, Documents], str]  # question, query, documents -> what the model is shown; no jax inside


@dataclass(frozen=True)
class Limits:
    """What an episode may use, in tokens where nothing else is said; `timeout` of a retrieval is in seconds."""

    turns: int = 5  # of the model, the last one without a search included
    searches: int = 4
    turn: int = 500  # that the model may write in a turn
    observation: int = 500  # of what a search brings; the end of a longer one is cut
    total: int = 4096  # of prompt and response
    prompt: int = 1024
    timeout: float = 30.0

    def __post_init__(self) -> None:
        numbers = (self.turns, self.turn, self.observation, self.total, self.prompt)
        if min(numbers) < 1 or self.searches < 0 or self.prompt >= self.total:
            raise InputError("limits must be positive, and prompt below total", got=self, remedy="Change them.")


@dataclass(frozen=True)
class TranscriptEpisode:
    """A whole episode; `ended` says that the model ended it, not a budget."""

    example_id: str
    transcript: Transcript
    pieces: tuple[Piece, ...]  # its text, the prompt left out
    ended: bool
    queries: tuple[str, ...] = ()
    documents: tuple[Documents, ...] = ()  # of each query that was carried out
    answer: str | None = None
    error: str | None = None  # of the retriever, or of what drew the turns
    may_search: bool = True


@dataclass(frozen=True)
class TranscriptRules:
    """What all episodes of a rollout go by, whoever draws their turns.

    `ends` are the ids that end a turn by themselves; `digest` writes what a protocol that shows digests shows of a
    search, and must not call jax.
    """

    protocol: Protocol
    tokenizer: Tokenizer
    limits: Limits = Limits()
    ends: frozenset[int] = frozenset()
    digest: Digest | None = None

    def stop_table(self) -> StopTable:
        """What ends a turn, token by token."""
        return stop_table(token_texts(self.tokenizer), self.protocol.stops, sorted(self.ends))

    def check(self, examples: Sequence[Example], prompts: Sequence[Sequence[int]]) -> None:
        """Raises InputError for prompts that are too long, or empty."""
        most = self.limits.prompt
        if longer := [e.id for e, p in zip(examples, prompts, strict=True) if not 1 <= len(p) <= most]:
            got, remedy = f"{len(longer)}, such as {longer[:3]}", f"Raise limits.prompt, now {most}."
            raise InputError("prompts do not fit their limit", got=got, remedy=remedy)

    def texts(self, turns: Sequence[Sequence[int]]) -> list[str]:
        """What the model wrote in each turn; the id that ended it is no text."""
        return self.tokenizer.decode([[i for i in turn if i not in self.ends] for turn in turns])


@dataclass
class OpenEpisode:
    """An episode that goes on."""

    rules: TranscriptRules
    number: int  # its place among the examples
    example: Example
    may_search: bool
    transcript: Transcript
    last: bool  # its next turn is the last one
    turns: int = 0
    draws: int = 0  # tokens that the model drew
    asked: list[str] = field(default_factory=list)
    documents: list[Documents] = field(default_factory=list)
    _action: Action = field(default_factory=lambda: Malformed("no turn yet"))
    _query: str = ""

    @classmethod
    def start(
        cls, rules: TranscriptRules, number: int, example: Example, prompt: Sequence[int], may_search: bool
    ) -> OpenEpisode:
        """An episode that has its prompt and no turn."""
        last = rules.limits.turns == 1 or not rules.limits.searches
        return cls(rules, number, example, may_search, Transcript.start(prompt), last)

    @property
    def room(self) -> int:
        """How many tokens the next turn may have."""
        return min(self.rules.limits.turn, self.rules.limits.total - len(self.transcript))

    def act(self, ids: Sequence[int], logprob: np.ndarray, text: str) -> str:
        """Reads a turn, as `TranscriptRules.texts` gives its text; returns the query to carry out, or ""."""
        drawn = np.minimum(logprob, 0.0)  # rounding
        self.transcript = self.transcript.append(ids, Segment.MODEL, self.turns, drawn)
        self.draws, self.turns = self.draws + len(ids), self.turns + 1
        self._action = self.read(text)
        wanted = isinstance(self._action, Search) and not (self.last or self._known(self._action))
        self._query = self._action.query if wanted else ""  # type: ignore[union-attr]
        return self._query

    def read(self, text: str) -> Action:
        """The action of the turn that has just ended."""
        protocol = self.rules.protocol
        return read_action(protocol, text, self.may_search and (not self.last or protocol.limit is not None))

    def _known(self, action: Search) -> bool:
        return self.rules.protocol.repeated is not None and action.query in self.asked

    def observe(self, documents: Documents | None = None, error: str | None = None) -> TranscriptEpisode | None:
        """Appends what the turn brings: `documents` of its query, or else an `error` of the retriever ends it.

        Returns: the whole episode when it has ended.
        """
        protocol, limits = self.rules.protocol, self.rules.limits
        by_itself = int(self.transcript.ids[-1]) in self.rules.ends
        if isinstance(self._action, Answer) or by_itself:
            return self._whole(ended=by_itself or not protocol.needs_end)
        if self.turns >= limits.turns:
            return self._whole(ended=False)
        if self._query and documents is None:
            return self.stop(error or "the retriever gave nothing")
        if isinstance(self._action, Search):
            self._append(self._found(self._action, documents if self._query else None), Segment.OBSERVATION)
        elif protocol.invalid is None:
            return self._whole(ended=False)
        else:
            self._append(protocol.invalid, Segment.INVALID)
        if not self.last and (self.turns == limits.turns - 1 or len(self.documents) >= limits.searches):
            self.last = True
            self._append(protocol.forced, Segment.FORCED)
        return self._whole(ended=False) if self.room < 1 else None

    def stop(self, error: str) -> TranscriptEpisode:
        """The episode as far as it came."""
        return self._whole(ended=False, error=error)

    def _found(self, action: Search, documents: Documents | None) -> str:
        """What the model is shown of a search."""
        protocol, digest = self.rules.protocol, self.rules.digest
        if documents is None:
            return observation(protocol, (), protocol.limit if self.last else protocol.repeated)
        self.asked.append(action.query)
        self.documents.append(documents)
        shown = None if digest is None else digest(self.example.question, action.query, documents)
        return observation(protocol, documents, shown)

    def _append(self, text: str | None, segment: Segment) -> None:
        if text:
            ids = self.rules.tokenizer.encode([text])[0][: self.rules.limits.observation]
            self.transcript = self.transcript.append(ids, segment, self.turns - 1)

    def _whole(self, ended: bool, error: str | None = None) -> TranscriptEpisode:
        pieces = self.transcript.response.pieces(self.rules.tokenizer.decode, self.rules.ends)
        own = [text for segment, text in pieces if segment == Segment.MODEL]
        return TranscriptEpisode(
            self.example.id,
            self.transcript,
            pieces,
            ended,
            tuple(self.asked),
            tuple(self.documents),
            final_answer(self.rules.protocol, own[-1]) if own else None,
            error,
            self.may_search,
        )


def retrieve(
    retriever: Retriever, queries: Sequence[str], vectors: np.ndarray, timeout: float
) -> tuple[dict[int, Documents], str | None]:
    """The documents of each query that is not "", by its place, or the error of all; vectors f32 [b, D]."""
    wanted = [i for i, query in enumerate(queries) if query]
    if not wanted:
        return {}, None
    with spent("retrieval"):
        found, error = guarded(lambda: list(retriever.search([queries[i] for i in wanted], vectors[wanted])), timeout)
    if error is None and len(found) != len(wanted):
        error = f"the retriever gave {len(found)} results for {len(wanted)} queries"
    return ({}, error) if error else ({i: tuple(hits) for i, hits in zip(wanted, found, strict=True)}, None)
