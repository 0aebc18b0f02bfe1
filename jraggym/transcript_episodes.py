"""The host side of episodes in slots of a device: which one is where, and what the device is told of it.

Each slot has an episode (`jraggym.transcript_episode`); when it ends, the next waiting one moves in, and begins with a
copy of the prompt's keys where another slot has the same prompt.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Sequence

import numpy as np

from jraggym.episodes import Retriever, episode_names
from jraggym.host_calls import Once, Rows
from jraggym.transcript_episode import OpenEpisode, TranscriptEpisode, TranscriptRules, retrieve
from jraggym.types import Example

Next = tuple[np.ndarray, ...]


class TranscriptEpisodes:
    """Episodes on `prompts` in `slots` rows, split over `shards` in order, as the waiting episodes are.

    `prompts` are the ids that each episode starts with, `may_search` whether it may use the retriever.
    """

    def __init__(
        self,
        rules: TranscriptRules,
        examples: Sequence[Example],
        prompts: Sequence[Sequence[int]],
        may_search: Sequence[bool],
        retriever: Retriever,
        *,
        slots: int,
        shards: int = 1,
    ):
        rules.check(examples, prompts)
        self._rules = rules
        self.examples = tuple(examples)
        self.done: list[TranscriptEpisode | None] = [None] * len(examples)
        self._prompts, self._may_search = [tuple(p) for p in prompts], list(may_search)
        self._retriever = retriever
        self._names = [zlib.crc32(name.encode()) for name in episode_names(examples)]
        self._per_shard = slots // shards
        # Neighbours wait for the same shard: copies of a question can share its prompt's keys there.
        parts = np.array_split(np.arange(len(examples)), shards)
        self._waiting = [deque(int(i) for i in part) for part in parts]
        self._slots: list[OpenEpisode | None] = [None] * slots
        self._pending: dict[tuple[int, int], tuple[list[bool], list[str]]] = {}
        self._once = Once()

    @property
    def finished(self) -> int:
        """How many episodes have ended."""
        return sum(episode is not None for episode in self.done)

    def start(self, rows: Rows) -> Next:
        """What the device begins with in these rows, whole shards; see `observe`."""
        shards = np.asarray(rows).reshape(-1, self._per_shard)  # a donor is a row of its own shard
        parts = [self._next(rows, [self._enter(row) for row in rows], [True] * len(rows)) for rows in shards]
        return tuple(np.concatenate(columns) for columns in zip(*parts, strict=True))

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

    def ended(self) -> dict[int, TranscriptEpisode]:
        """The episodes that ended here, by the number of their example."""
        return {number: episode for number, episode in enumerate(self.done) if episode is not None}

    def _act(self, step, rows, stopped, tokens, logprob, count) -> Next:
        queries = [""] * len(rows)
        turns = [tokens[i, : count[i]].tolist() if stopped[i] else [] for i in range(len(rows))]
        acted = [bool(stopped[i]) and self._slots[row] is not None for i, row in enumerate(rows)]
        for i, (row, text) in enumerate(zip(rows, self._rules.texts(turns), strict=True)):
            if acted[i]:
                queries[i] = self._slots[row].act(turns[i], logprob[i, : count[i]], text)
        self._pending[int(step), int(rows[0])] = acted, queries
        ids, mask = self._retriever.tokenize(queries)
        return np.asarray(rows, np.int32), ids, mask

    def _observe(self, step, rows, vectors) -> Next:
        acted, queries = self._pending.pop((int(step), int(rows[0])))
        found, error = retrieve(self._retriever, queries, vectors, self._rules.limits.timeout)
        fed = [0 if self._slots[row] is None else len(self._slots[row].transcript) for row in rows]
        fresh = [False] * len(rows)
        for i, row in enumerate(rows):
            if acted[i] and (whole := self._slots[row].observe(found.get(i), error)) is not None:
                self.done[self._slots[row].number] = whole
                self._slots[row] = None
                fresh[i] = self._enter(row)
        return self._next(rows, fresh, acted, fed)

    def _enter(self, row: int) -> bool:
        """The next waiting episode moves into the slot, if there is one."""
        waiting = self._waiting[row // self._per_shard]
        if not waiting:
            return False
        number = waiting.popleft()
        prompt, may_search = self._prompts[number], self._may_search[number]
        self._slots[row] = OpenEpisode.start(self._rules, number, self.examples[number], prompt, may_search)
        return True

    # --- what the device is told

    def _next(self, rows: Rows, fresh: Sequence[bool], changed: Sequence[bool], fed: Sequence[int] = ()) -> Next:
        """`fed` are the lengths of the transcripts that the slots know, their last token included."""
        b, limits = len(rows), self._rules.limits
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
            limit[i] = now.room
        return tokens, count, start, last, donor, np.array(changed), opened, limit, name, number

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
