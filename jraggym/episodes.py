"""The host side of a batch of episodes: what the jitted rollout calls back for.

Each turn has two calls. `act` gets the sampled actions and gives the queries as ids for the query encoder (which
runs on the device, since jax must not be called inside a callback). `observe` gets the query vectors, retrieves,
lets the judge rank, executes one candidate and gives the next prompts.

Each row of the device's batch is a slot: when its episode ends, the next waiting one moves in, so that the device
never computes for finished episodes while others wait.

Every call names its step of the loop and its rows. The first call for them does the work and later ones get the same
result, whoever asks.
"""

from __future__ import annotations

import random
import zlib
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from jraggym.clock import spent
from jraggym.environment import transition, wants_retrieval
from jraggym.errors import InputError
from jraggym.host_calls import Once, Rows
from jraggym.labelling import Judge
from jraggym.retrieval.guard import guarded
from jraggym.selection import SELECTORS
from jraggym.text.actions import parse_action
from jraggym.text.batching import Codec
from jraggym.types import Action, Candidate, Document, Example, Search, State, Step, Trajectory

Documents = tuple[Document, ...]
Prompts = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]


class Retriever(Protocol):
    """What a rollout needs of a retriever: ids for its encoder, the encoder, and the search by vectors."""

    @property
    def params(self) -> Any: ...
    def tokenize(self, queries: Sequence[str]) -> tuple[np.ndarray, np.ndarray]: ...
    def encode(self, params: Any, ids: Any, mask: Any) -> Any: ...
    def search(self, queries: Sequence[str], vectors: np.ndarray, k: int | None = None) -> list[Documents]: ...


@dataclass(frozen=True)
class Rules:
    """How episodes run: the turn budget, which candidate is executed, who labels, and the retriever's patience.

    With a judge every candidate's search is carried out, without one only the executed one's. `select` names a
    rule of selection.SELECTORS. `timeout` is in seconds.
    """

    max_turns: int = 5
    select: str = "first"
    judge: Judge | None = None
    timeout: float = 30.0
    seed: int = 0


@dataclass
class _Pending:
    """What `act` leaves for `observe`: one entry for each row."""

    candidates: list[list[Candidate]]
    actions: list[list[Action]]
    chosen: list[int]
    searches: list[list[tuple[int, str]]]  # (candidate, query) of what is to be retrieved


class Episodes:
    """Episodes on `examples` in `slots` rows; those that find no slot wait for one of a finished episode.

    Slots are split over `shards` in order, and so are the waiting episodes, so which one moves in where does not depend
    on the order in which shards call. Slots beyond the examples are padding and closed from the start.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        codec: Codec,
        retriever: Retriever,
        rules: Rules,
        *,
        slots: int | None = None,
        shards: int = 1,
        starts: Sequence[State] | None = None,
    ):
        """`starts` are the states that the episodes go on from; by default every one starts with its question."""
        self.examples, self.rules = tuple(examples), rules
        self._codec, self._retriever = codec, retriever
        self._states = [State(example.question) for example in examples] if starts is None else list(starts)
        if len(self._states) != len(examples) or any(state.done for state in self._states):
            ended = sum(state.done for state in self._states)
            got = f"{len(self._states)} states for {len(examples)} examples, {ended} of them over"
            raise InputError("episodes cannot start here", got=got, remedy="Give each example an open state.")
        self._names = episode_names(examples)
        self._steps: list[list[Step]] = [[] for _ in examples]
        size = len(examples) if slots is None else slots
        self._occupant = [row if row < len(examples) else None for row in range(size)]
        self._per_shard = max(size // shards, 1)
        self._waiting = [deque(range(size + shard, len(examples), shards)) for shard in range(shards)]
        self._pending: dict[tuple[int, int], _Pending] = {}
        self._once = Once()

    @property
    def finished(self) -> int:
        """How many episodes have ended."""
        return sum(state.done for state in self._states)

    def prompts(self, rows: Rows) -> Prompts:
        """What the device needs to go on with the rows, padded on the left.

        Returns: ids int32 [b, P], mask bool [b, P], open bool [b], name uint32 [b] of the episode (a hash of its
        example's id, and of which of its copies it is) and its turn int32 [b]; with the key they decide every draw.
        """
        size = self._codec.max_prompt
        ids, mask = np.zeros((len(rows), size), np.int32), np.zeros((len(rows), size), bool)
        opened, name, turn = np.zeros(len(rows), bool), np.zeros(len(rows), np.uint32), np.zeros(len(rows), np.int32)
        mask[:, -1] = True  # a closed row's prompt is one padding token
        for i, row in enumerate(rows):
            if (number := self._open(row)) is not None:
                prompt = self._codec.prompt(self._states[number])
                ids[i, size - len(prompt) :] = prompt
                mask[i, size - len(prompt) :] = True
                opened[i], turn[i] = True, len(self._states[number].turns)
                name[i] = zlib.crc32(self._names[number].encode())
        return ids, mask, opened, name, turn

    def act(
        self,
        step: int,
        rows: Rows,
        tokens: np.ndarray,
        mask: np.ndarray,
        logprob: np.ndarray,
        score: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Reads the sampled actions and says what is to be retrieved.

        Args: tokens, mask, logprob [b, K, A]; score [b, K].
        Returns: rows, query ids int32 [b, M, T] and mask [b, M, T]; M is K with a judge and 1 without.
        """
        return self._once("act", step, rows, lambda: self._act(step, rows, tokens, mask, logprob, score))

    def observe(self, step: int, rows: Rows, vectors: np.ndarray) -> Prompts:
        """Retrieves, labels and executes; vectors f32 [b, M, D]. Returns the next `prompts`."""
        return self._once("observe", step, rows, lambda: self._observe(step, rows, vectors))

    def trajectories(self) -> list[Trajectory]:
        """The episodes, finished or not."""
        rows = zip(self.examples, self._steps, self._states, strict=True)
        return [Trajectory(example.id, tuple(steps), state) for example, steps, state in rows]

    def _open(self, row: int) -> int | None:
        """The number of the row's episode, if it has one that goes on."""
        number = self._occupant[row] if row < len(self._occupant) else None
        return None if number is None or self._states[number].done else number

    def _refill(self, row: int) -> None:
        waiting = self._waiting[row // self._per_shard]
        if self._open(row) is None and waiting:
            self._occupant[row] = waiting.popleft()

    def _act(self, step, rows, tokens, mask, logprob, score) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        b, k, a = tokens.shape
        ids = [row[m].tolist() for row, m in zip(tokens.reshape(-1, a), mask.reshape(-1, a), strict=True)]
        texts = self._codec.decode(ids)
        pending = _Pending([], [], [], [])
        slots = k if self.rules.judge else 1
        queries = [""] * (b * slots)
        for i, row in enumerate(rows):
            number = self._open(row)
            group = () if number is None else range(i * k, i * k + k)
            candidates = [_sampled(texts[j], ids[j], logprob[i, j - i * k], float(score.flat[j])) for j in group]
            actions = [parse_action(candidate.text) for candidate in candidates]
            chosen = -1 if number is None or self.rules.judge else self._select(number, candidates)
            searches = [] if number is None else self._searches(number, actions, chosen)
            for slot, query in searches:
                queries[i * slots + (slot if self.rules.judge else 0)] = query
            for part, item in zip(vars(pending).values(), (candidates, actions, chosen, searches), strict=True):
                part.append(item)
        self._pending[int(step), int(rows[0])] = pending
        query_ids, query_mask = self._retriever.tokenize(queries)
        return rows, query_ids.reshape(b, slots, -1), query_mask.reshape(b, slots, -1)

    def _select(self, number: int, candidates: Sequence[Candidate]) -> int:
        # The generator depends on the example and the turn alone, not on the batch that the episode runs in.
        rng = random.Random(f"{self.rules.seed}/{self._names[number]}/{len(self._states[number].turns)}")
        chosen = candidates[SELECTORS[self.rules.select](candidates, rng)]
        # Equal texts are one action. The first stands for all: their scores differ by rounding, which must not choose.
        return next(i for i, candidate in enumerate(candidates) if candidate.text == chosen.text)

    def _searches(self, number: int, actions: Sequence[Action], chosen: int) -> list[tuple[int, str]]:
        state, wanted = self._states[number], range(len(actions)) if chosen < 0 else (chosen,)
        return [
            (i, action.query)
            for i in wanted
            if isinstance(action := actions[i], Search) and wants_retrieval(state, action, self.rules.max_turns)
        ]

    def _observe(self, step, rows, vectors) -> Prompts:
        pending = self._pending.pop((int(step), int(rows[0])))
        found, error = self._retrieve(pending, vectors)
        for i, row in enumerate(rows):
            if (number := self._open(row)) is not None:
                documents = [found.get((i, j)) for j in range(len(pending.candidates[i]))]
                failed = error if pending.searches[i] else None
                self._execute(number, pending.candidates[i], pending.actions[i], pending.chosen[i], documents, failed)
                self._refill(row)
        return self.prompts(rows)

    def _retrieve(self, pending: _Pending, vectors: np.ndarray) -> tuple[dict[tuple[int, int], Documents], str | None]:
        """Documents by (row, candidate), and what went wrong if anything did."""
        wanted = [(i, slot, query) for i, searches in enumerate(pending.searches) for slot, query in searches]
        if not wanted:
            return {}, None
        place = [(i, slot if self.rules.judge else 0) for i, slot, _ in wanted]
        picked = np.stack([vectors[at] for at in place])
        queries = [query for _, _, query in wanted]
        with spent("retrieval"):
            found, error = guarded(lambda: list(self._retriever.search(queries, picked)), self.rules.timeout)
        if error is None and len(found) != len(wanted):
            error = f"the retriever gave {len(found)} results for {len(wanted)} queries"
        if error is not None:
            return {}, error
        return {(i, slot): tuple(hits) for (i, slot, _), hits in zip(wanted, found, strict=True)}, None

    def _execute(
        self,
        number: int,
        candidates: list[Candidate],
        actions: list[Action],
        chosen: int,
        documents: list[Documents | None],
        error: str | None,
    ) -> None:
        state, example = self._states[number], self.examples[number]
        judge = self.rules.judge
        rewards = judge(example, state, actions, documents) if judge and error is None else [None] * len(actions)
        labelled = tuple(
            replace(c, reward=reward, documents=tuple(d.id for d in hits or ()))
            for c, reward, hits in zip(candidates, rewards, documents, strict=True)
        )
        if chosen < 0:
            chosen = self._select(number, labelled)
        action = actions[chosen]
        executed = wants_retrieval(state, action, self.rules.max_turns)
        outcome = (documents[chosen] or (), error) if executed else ((), None)
        self._steps[number].append(Step(state, labelled, chosen))
        self._states[number] = transition(state, action, *outcome, max_turns=self.rules.max_turns)


def episode_names(examples: Sequence[Example]) -> list[str]:
    """A name for each episode: the example's id, and for further episodes of the same example "id#1", "id#2", ..."""
    seen: Counter[str] = Counter()
    names = []
    for example in examples:
        names.append(f"{example.id}#{seen[example.id]}" if seen[example.id] else example.id)
        seen[example.id] += 1
    return names


def _sampled(text: str, ids: Sequence[int], logprobs: np.ndarray, score: float) -> Candidate:
    kept = tuple(map(float, logprobs[: len(ids)]))
    return Candidate(text, None, score, sum(kept), (), tuple(ids), kept)
