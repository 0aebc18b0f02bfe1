"""The host side of episodes that are one growing transcript: read a turn, retrieve, append ids, say what comes next.

Ids are appended and never made from text again, so what a trainer reads is what the policy was fed. Each slot of the
device has an episode; when it ends, the next waiting one moves in, and begins with a copy of the prompt's keys where
another slot has the same prompt.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from jraggym.episodes import Retriever, episode_names
from jraggym.errors import InputError
from jraggym.host_calls import Once, Rows
from jraggym.protocols.protocol import Protocol, observation
from jraggym.protocols.reading import final_answer, read_action
from jraggym.retrieval.guard import guarded
from jraggym.text.tokenizer import Tokenizer
from jraggym.transcripts import Transcript
from jraggym.types import Action, Answer, Document, Example, Piece, Search, Segment

Next = tuple[np.ndarray, ...]
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
    error: str | None = None  # of the retriever
    may_search: bool = True


@dataclass
class _Open:
    """An episode that goes on."""

    number: int
    transcript: Transcript
    draws: int = 0
    turns: int = 0
    last: bool = False  # its next turn is the last one
    asked: list[str] = field(default_factory=list)
    documents: list[Documents] = field(default_factory=list)


class TranscriptEpisodes:
    """Episodes on `prompts` in `slots` rows, split over `shards` in order, as the waiting episodes are.

    `prompts` are the ids that each episode starts with, `may_search` whether it may use the retriever.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        prompts: Sequence[Sequence[int]],
        may_search: Sequence[bool],
        protocol: Protocol,
        tokenizer: Tokenizer,
        ends: Sequence[int],
        retriever: Retriever,
        limits: Limits,
        *,
        slots: int,
        shards: int = 1,
        digest: Digest | None = None,
    ):
        if longer := [e.id for e, p in zip(examples, prompts, strict=True) if len(p) > limits.prompt or len(p) < 1]:
            remedy = f"Raise limits.prompt, now {limits.prompt}."
            raise InputError(
                "prompts do not fit their limit", got=f"{len(longer)}, such as {longer[:3]}", remedy=remedy
            )
        self.examples, self.done = tuple(examples), [None] * len(examples)
        self._prompts, self._may_search = [tuple(p) for p in prompts], list(may_search)
        self._protocol, self._tokenizer, self._ends = protocol, tokenizer, set(ends)
        self._retriever, self._limits, self._digest = retriever, limits, digest
        self._names = [zlib.crc32(name.encode()) for name in episode_names(examples)]
        self._per_shard = slots // shards
        # Neighbours wait for the same shard: copies of a question can share its prompt's keys there.
        parts = np.array_split(np.arange(len(examples)), shards)
        self._waiting = [deque(int(i) for i in part) for part in parts]
        self._slots: list[_Open | None] = [None] * slots
        self._held: list[tuple[int, ...] | None] = [None] * slots  # the prompt whose keys a slot has
        self._pending: dict[tuple[int, int], tuple[list[Action | None], list[str]]] = {}
        self._once = Once()

    @property
    def finished(self) -> int:
        """How many episodes have ended."""
        return sum(episode is not None for episode in self.done)

    def start(self, rows: Rows) -> Next:
        """What the device begins with in the rows; see `observe`."""
        fresh = [self._enter(row) for row in rows]
        return self._next(rows, fresh, [True] * len(rows))

    def act(self, step: int, rows: Rows, stopped: np.ndarray, tokens, logprob, count) -> Next:
        """Reads the turns that have ended: stopped bool [b], tokens int32 and logprob f32 [b, A], count int32 [b].

        Returns: rows, and the query of each row as ids int32 [b, T] and mask [b, T].
        """
        return self._once("act", step, rows, lambda: self._act(step, rows, stopped, tokens, logprob, count))

    def observe(self, step: int, rows: Rows, vectors: np.ndarray) -> Next:
        """Retrieves for the rows that search, vectors f32 [b, D], and says how each row goes on.

        Returns: tokens int32 [b, X], count [b], start [b], last [b], donor [b], as `News` has them (donors counted
        within the shard); changed bool [b]: a new turn begins; opened bool [b]; limit int32 [b] of the turn;
        name uint32 [b] of the episode and number int32 [b] of its next draw.
        """
        return self._once("observe", step, rows, lambda: self._observe(step, rows, vectors))

    def episodes(self) -> list[TranscriptEpisode]:
        """All episodes, in the order of the examples; each has ended."""
        assert all(episode is not None for episode in self.done)
        return self.done  # type: ignore[return-value]

    # --- reading

    def _act(self, step, rows, stopped, tokens, logprob, count) -> Next:
        actions: list[Action | None] = [None] * len(rows)
        queries = [""] * len(rows)
        turns = [tokens[i, : count[i]].tolist() if stopped[i] else [] for i in range(len(rows))]
        texts = self._tokenizer.decode([[t for t in turn if t not in self._ends] for turn in turns])
        for i, row in enumerate(rows):
            now = self._slots[row]
            if now is None or not stopped[i]:
                continue
            drawn = np.minimum(logprob[i, : count[i]], 0.0)  # rounding
            now.transcript = now.transcript.append(turns[i], Segment.MODEL, now.turns, drawn)
            now.draws, now.turns = now.draws + int(count[i]), now.turns + 1
            actions[i] = action = self._read(now, texts[i])
            if isinstance(action, Search) and not (now.last or self._known(now, action)):
                queries[i] = action.query
        self._pending[int(step), int(rows[0])] = actions, queries
        ids, mask = self._retriever.tokenize(queries)
        return np.asarray(rows, np.int32), ids, mask

    def _read(self, now: _Open, turn: str) -> Action:
        """The action of the turn that has just ended."""
        allowed = self._may_search[now.number] and (not now.last or self._protocol.limit is not None)
        return read_action(self._protocol, turn, allowed)

    def _known(self, now: _Open, action: Search) -> bool:
        return self._protocol.repeated is not None and action.query in now.asked

    def _observe(self, step, rows, vectors) -> Next:
        actions, queries = self._pending.pop((int(step), int(rows[0])))
        found, error = self._retrieve(queries, vectors)
        fed = [0 if self._slots[row] is None else len(self._slots[row].transcript.ids) for row in rows]
        fresh = [False] * len(rows)
        for i, row in enumerate(rows):
            now = self._slots[row]
            if now is None or actions[i] is None:
                continue
            self._move(now, actions[i], found.get(i), error)
            if self.done[now.number] is not None:
                self._slots[row] = None
                fresh[i] = self._enter(row)
        changed = [f or action is not None for f, action in zip(fresh, actions, strict=True)]
        return self._next(rows, fresh, changed, fed)

    def _retrieve(self, queries: Sequence[str], vectors) -> tuple[dict[int, Documents], str | None]:
        wanted = [i for i, query in enumerate(queries) if query]
        if not wanted:
            return {}, None
        call = lambda: list(self._retriever.search([queries[i] for i in wanted], vectors[wanted]))  # noqa: E731
        found, error = guarded(call, self._limits.timeout)
        if error is None and len(found) != len(wanted):
            error = f"the retriever gave {len(found)} results for {len(wanted)} queries"
        return ({}, error) if error else ({i: tuple(hits) for i, hits in zip(wanted, found, strict=True)}, None)

    # --- one episode

    def _move(self, now: _Open, action: Action, documents: Documents | None, error: str | None) -> None:
        """Appends what the action brings, or ends the episode."""
        protocol, limits = self._protocol, self._limits
        by_itself = int(now.transcript.ids[-1]) in self._ends
        if isinstance(action, Answer) or by_itself:
            return self._end(now, ended=by_itself or not protocol.needs_end)
        if now.turns >= limits.turns or (isinstance(action, Search) and error is not None and documents is None):
            return self._end(now, ended=False, error=error if now.turns < limits.turns else None)
        if not isinstance(action, Search):
            if protocol.invalid is None:
                return self._end(now, ended=False)
            self._append(now, protocol.invalid, Segment.INVALID)
        else:
            self._append(now, self._found(now, action, documents), Segment.OBSERVATION)
        spent = now.turns == limits.turns - 1 or len(now.documents) >= limits.searches
        if spent and not now.last:
            now.last = True
            self._append(now, protocol.forced, Segment.FORCED)
        if len(now.transcript) >= limits.total:
            return self._end(now, ended=False)
        return None

    def _found(self, now: _Open, action: Search, documents: Documents | None) -> str:
        """What the model is shown of a search."""
        protocol, example = self._protocol, self.examples[now.number]
        if documents is None:
            return observation(protocol, (), protocol.limit if now.last else protocol.repeated)
        now.asked.append(action.query)
        now.documents.append(documents)
        digest = None if self._digest is None else self._digest(example.question, action.query, documents)
        return observation(protocol, documents, digest)

    def _append(self, now: _Open, text: str | None, segment: Segment) -> None:
        if text:
            ids = self._tokenizer.encode([text])[0][: self._limits.observation]
            now.transcript = now.transcript.append(ids, segment, now.turns - 1)

    def _end(self, now: _Open, ended: bool, error: str | None = None) -> None:
        pieces = now.transcript.response.pieces(self._tokenizer.decode, self._ends)
        own = [text for segment, text in pieces if segment == Segment.MODEL]
        self.done[now.number] = TranscriptEpisode(
            self.examples[now.number].id,
            now.transcript,
            pieces,
            ended,
            tuple(now.asked),
            tuple(now.documents),
            final_answer(self._protocol, own[-1]) if own else None,
            error,
            self._may_search[now.number],
        )

    def _enter(self, row: int) -> bool:
        """The next waiting episode moves into the slot, if there is one."""
        waiting = self._waiting[row // self._per_shard]
        if not waiting:
            return False
        number = waiting.popleft()
        start = Transcript.start(self._prompts[number])
        self._slots[row] = _Open(number, start, last=self._limits.turns == 1 or not self._limits.searches)
        return True

    # --- what the device is told

    def _next(self, rows: Rows, fresh: Sequence[bool], changed: Sequence[bool], fed: Sequence[int] = ()) -> Next:
        """`fed` are the lengths of the transcripts that the slots know, their last token included."""
        b, limits = len(rows), self._limits
        tokens = np.zeros((b, max(limits.prompt, 2 * limits.observation + 1)), np.int32)
        count, start, last, limit, number = (np.zeros(b, np.int32) for _ in range(5))
        donor, name, opened = np.full(b, -1, np.int32), np.zeros(b, np.uint32), np.zeros(b, bool)
        donors = self._donors(rows, fresh)
        for i, row in enumerate(rows):
            now = self._slots[row]
            if now is None:
                continue
            opened[i], name[i], number[i] = True, self._names[now.number], now.draws
            ids = now.transcript.ids
            if not changed[i]:  # its turn goes on
                continue
            known = 0 if fresh[i] else fed[i] - 1  # the last known token has not been fed yet
            if i in donors:
                donor[i], known = donors[i], len(ids) - 1
            news = ids[known:-1]
            tokens[i, : len(news)], count[i], start[i], last[i] = news, len(news), known, ids[-1]
            limit[i] = self._limit(now)
        return tokens, count, start, last, donor, np.array(changed), opened, limit, name, number

    def _limit(self, now: _Open) -> int:
        """How many tokens the model may draw in its next turn."""
        return min(self._limits.turn, self._limits.total - len(now.transcript))

    def _donors(self, rows: Rows, fresh: Sequence[bool]) -> dict[int, int]:
        """For each row that begins, another row with the same prompt, which has it or computes it now."""
        holders: dict[tuple[int, ...], int] = {}
        for i, row in enumerate(rows):
            if self._slots[row] is not None and not fresh[i]:
                holders[self._prompts[self._slots[row].number]] = i
        donors = {}
        for i, row in enumerate(rows):
            if fresh[i]:
                prompt = self._prompts[self._slots[row].number]
                if prompt in holders:
                    donors[i] = holders[prompt]
                else:
                    holders[prompt] = i
        return donors
