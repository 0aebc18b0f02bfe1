"""The bridge from text to arrays: states and candidates become one `ProcessBatch`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from jraggym.batch import ProcessBatch
from jraggym.errors import InputError
from jraggym.text.actions import STOPS, format_action
from jraggym.text.rendering import FINISH, render, render_turn
from jraggym.text.tokenizer import Tokenizer
from jraggym.types import Answer, Candidate, Search, State, Trajectory


@dataclass(frozen=True, slots=True)
class Row:
    """One state with its candidates, as ids, before padding."""

    prompt: list[int]
    actions: list[list[int]]
    loss_masks: list[list[bool]]
    rewards: list[float]
    distinct: list[bool]  # candidates that count: labelled, and not the same text as an earlier one
    logprobs: list[list[float]] | None = None  # of the sampling policy, for each token; 0 where it drew none
    step_rewards: list[list[float]] | None = None  # on the last token of each step of an episode, 0 elsewhere
    reference: list[list[float]] | None = None  # log-probabilities of a frozen reference, for each token

    @property
    def sizes(self) -> tuple[int, int]:
        """Prompt tokens and the longest action's tokens."""
        return len(self.prompt), max(map(len, self.actions))


EMPTY_ROW = Row([0], [[]], [[]], [0.0], [False])  # fills a batch up; no objective reads it


@dataclass(frozen=True, slots=True)
class Codec:
    """Turns states and actions into ids, with the turn budget that decides where <finish> stands."""

    tokenizer: Tokenizer
    max_turns: int
    max_prompt: int

    appends: ClassVar[bool] = True  # a later prompt begins with the earlier one and the action behind it

    @property
    def stops(self) -> tuple[int, ...]:
        """Ids that end an action: generation stops behind them."""
        return tuple(self.tokenizer.token_id(stop) for stop in STOPS)

    def encode(self, actions: Sequence[str]) -> list[list[int]]:
        """Ids of each action, the one that ends it included."""
        return self.tokenizer.encode(actions)

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """Text of each sampled action."""
        return self.tokenizer.decode(ids)

    def prompt_ids(self, segments: Sequence[str]) -> list[int]:
        """Ids of a prompt, however long."""
        return [i for segment in self.tokenizer.encode(segments) for i in segment]

    def prompt(self, state: State) -> list[int]:
        """The ids of the rendered state, at most `max_prompt` long.

        A longer one loses whole segments after the question, oldest first; the question and what came
        last stay. Raises InputError where a chat's template and the question alone are longer.
        """
        question, *later = render(state, self.max_turns)
        ids = self.prompt_ids([question, *later])
        least = 1 if self.appends or later[-1:] == [FINISH] else 0  # a chat cannot be cut, but its last document can go
        while len(ids) > self.max_prompt and len(later) > least:
            ids = self.prompt_ids([question, *(later := later[1:])])
        if len(ids) > self.max_prompt and not self.appends:
            remedy = "Raise --settings.max-prompt, and with it --settings.edges or --schedule.prompt."
            raise InputError("a chat does not fit max_prompt", got=f"{len(ids)} > {self.max_prompt}", remedy=remedy)
        return ids[-self.max_prompt :]

    def row(self, state: State, actions: Sequence[str], rewards: Sequence[float | None]) -> Row:
        """A state with K candidate actions; repeated texts and unlabelled candidates do not count."""
        ids = self.encode(actions)
        distinct = [
            r is not None and a not in actions[:i] for i, (a, r) in enumerate(zip(actions, rewards, strict=True))
        ]
        values = [0.0 if r is None else r for r in rewards]
        return Row(self.prompt(state), ids, [[True] * len(i) for i in ids], values, distinct)

    def samples(self, state: State, candidates: Sequence[Candidate]) -> Row:
        """A state with its K candidates as they were sampled, token by token; equal ones all count."""
        ids = [list(candidate.tokens) for candidate in candidates]
        labelled = [candidate.reward is not None and bool(i) for candidate, i in zip(candidates, ids, strict=True)]
        rewards = [candidate.reward or 0.0 for candidate in candidates]
        logprobs = [list(candidate.logprobs) for candidate in candidates]
        return Row(self.prompt(state), ids, [[True] * len(i) for i in ids], rewards, labelled, logprobs)

    def transcripts(self, group: Sequence[Trajectory], rewards: Sequence[float], baseline: float = 0.0) -> Row:
        """K episodes of one question as K candidates: what the policy sampled counts, what came back does not.

        Every token stands behind exactly those that the policy saw when it drew it. Where a later prompt would show
        something else (a malformed action or one spelt unusually is rendered anew, a long prompt loses its oldest
        segments, and every turn of a chat model is a new chat), the transcript ends with that action. A step that was
        judged has its reward minus `baseline`.
        """
        prompt = self.prompt(group[0].steps[0].state)
        parts = [self._transcript(trajectory, len(prompt), baseline) for trajectory in group]
        ids, counts, logprobs, step_rewards = (list(column) for column in zip(*parts, strict=True))
        return Row(prompt, ids, counts, list(rewards), [True] * len(group), logprobs, step_rewards)

    def _transcript(self, trajectory: Trajectory, before: int, baseline: float):
        """Ids, whether the policy drew them, their log-probabilities, and the steps' rewards."""
        ids: list[int] = []
        counts: list[bool] = []
        logprobs: list[float] = []
        rewards: list[float] = []
        for step, following in zip(trajectory.steps, (*trajectory.steps[1:], None), strict=True):
            drawn = step.candidates[step.chosen]
            ids += drawn.tokens
            counts += [True] * len(drawn.tokens)
            logprobs += drawn.logprobs
            rewards += [0.0] * (len(drawn.tokens) - 1) + [0.0 if drawn.reward is None else drawn.reward - baseline]
            if following is None or not self.appends:
                break
            old, new = (render(state, self.max_turns) for state in (step.state, following.state))
            action, *observed = self.tokenizer.encode(new[len(old) :])
            back = [i for segment in observed for i in segment]
            if tuple(action) != drawn.tokens or before + len(ids) + len(back) > self.max_prompt:
                break
            ids += back
            counts += [False] * len(back)
            logprobs += [0.0] * len(back)
            rewards += [0.0] * len(back)
        return ids, counts, logprobs, rewards

    def imitations(self, final: State) -> list[Row]:
        """The rows to imitate an episode from: here one, with all of it."""
        return [self.episode(final)]

    def episode(self, final: State) -> Row:
        """A whole finished episode as one candidate: the policy's actions count, what came back does not.

        Same tokens as inference saw, since rendering only appends. The reward is 1.
        """
        prompt = self.prompt_ids(render(State(final.question), self.max_turns))
        ids: list[int] = []
        counts: list[bool] = []
        for number, turn in enumerate(final.turns, 2):
            segments = list(render_turn(turn)) + ([FINISH] if number == self.max_turns else [])
            acted = isinstance(turn.action, Search)  # the <malformed> marker is not the policy's own text
            for place, segment in enumerate(self.tokenizer.encode(segments)):
                ids += segment
                counts += [acted and place == 0] * len(segment)
        if final.answer is not None:
            answer = self.tokenizer.encode([format_action(Answer(final.answer, final.thought))])[0]
            ids += answer
            counts += [True] * len(answer)
        return Row(prompt, [ids], [counts], [1.0], [True])


def collate(
    rows: Sequence[Row], *, prompt: int, action: int, candidates: int, pad: int = 0, only: np.ndarray | None = None
) -> ProcessBatch:
    """Pads rows to B = len(rows), P = `prompt` (left), K = `candidates`, A = `action` (right).

    With `only` just these rows are in the batch, one process's part of it; which optional fields there are, all decide.
    Raises InputError when a row does not fit: nothing is cut silently.
    """
    built = rows if only is None else [rows[i] for i in only]
    b, k = len(built), candidates
    batch = ProcessBatch(
        prompt=np.full((b, prompt), pad, np.int32),
        prompt_mask=np.zeros((b, prompt), bool),
        action=np.full((b, k, action), pad, np.int32),
        action_mask=np.zeros((b, k, action), bool),
        loss_mask=np.zeros((b, k, action), bool),
        reward=np.zeros((b, k), np.float32),
        candidate_mask=np.zeros((b, k), bool),
        behaviour_logprob=np.zeros((b, k, action), np.float32),
        reference_logprob=np.zeros((b, k, action), np.float32) if any(row.reference for row in rows) else None,
        token_reward=np.zeros((b, k, action), np.float32) if any(row.step_rewards for row in rows) else None,
    )
    for i, row in enumerate(built):
        longest = row.sizes
        if longest[0] > prompt or longest[1] > action or len(row.actions) > k:
            raise InputError(
                "a row does not fit the batch",
                got=f"{longest[0]} prompt and {longest[1]} action tokens, {len(row.actions)} candidates",
                remedy=f"The batch holds {prompt}, {action} and {k}: choose a larger bucket.",
            )
        batch.prompt[i, prompt - len(row.prompt) :] = row.prompt
        batch.prompt_mask[i, prompt - len(row.prompt) :] = True
        for j, ids in enumerate(row.actions):
            batch.action[i, j, : len(ids)] = ids
            batch.action_mask[i, j, : len(ids)] = True
            batch.loss_mask[i, j, : len(ids)] = row.loss_masks[j]
            batch.reward[i, j] = row.rewards[j]
            batch.candidate_mask[i, j] = row.distinct[j]
            if row.logprobs is not None:
                batch.behaviour_logprob[i, j, : len(ids)] = row.logprobs[j]
            if row.reference is not None and batch.reference_logprob is not None:
                batch.reference_logprob[i, j, : len(ids)] = row.reference[j][: len(ids)]
            if row.step_rewards is not None and batch.token_reward is not None:
                batch.token_reward[i, j, : len(ids)] = row.step_rewards[j]
    return batch


@dataclass(frozen=True, slots=True)
class Bucket:
    """A batch shape: B rows of P prompt tokens and K candidates of A action tokens."""

    rows: int
    prompt: int
    action: int


def buckets(edges: Sequence[tuple[int, int]], tokens: int, candidates: int) -> tuple[Bucket, ...]:
    """Batch shapes of about `tokens` tokens each, for (P, A) edges in ascending order."""
    return tuple(Bucket(max(1, tokens // (p + candidates * a)), p, a) for p, a in edges)


class Batches:
    """Random access to training batches: item `step` is a pure function of (rows, shapes, seed, step).

    Each row goes to the first bucket that it fits. In every epoch each bucket's rows are dealt anew and the order
    of batches is shuffled; a bucket's last batch is filled up from its front.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        shapes: Sequence[Bucket],
        *,
        candidates: int,
        seed: int,
        pad: int = 0,
        short_first: int = 0,
    ):
        """`short_first`: so many steps draw from the first bucket alone (a curriculum)."""
        if not rows:
            raise InputError("there is no row to train on", got="0 rows", remedy="Give at least one.")
        self._rows, self._shapes, self._seed = rows, shapes, seed
        self._short_first, self._candidates, self._pad = short_first, candidates, pad
        self._members: list[list[int]] = [[] for _ in shapes]
        for i, row in enumerate(rows):
            self._members[self._fit(row.sizes)].append(i)
        if short_first and not self._members[0]:
            raise InputError("no row fits the first bucket", got=shapes[0], remedy="Widen it, or set short_first=0.")
        self._plan: tuple[int, list[tuple[int, np.ndarray]]] = (-1, [])

    @property
    def epoch_steps(self) -> int:
        """Batches in one epoch."""
        return sum(-(-len(m) // shape.rows) for m, shape in zip(self._members, self._shapes, strict=True))

    def __getitem__(self, step: int) -> ProcessBatch:
        return self._collate(*self._chosen(step))

    def part(self, step: int, own: Callable[[int], np.ndarray]) -> tuple[ProcessBatch, int]:
        """One process's rows of a batch, `own` of their number, and that number."""
        which, chosen = self._chosen(step)
        return self._collate(which, chosen, own(len(chosen))), len(chosen)

    def _chosen(self, step: int) -> tuple[int, np.ndarray]:
        """The bucket and the rows of a batch."""
        if step < self._short_first:
            per_epoch = -(-len(self._members[0]) // self._shapes[0].rows)
            epoch, place = divmod(step, per_epoch)
            return 0, self._deal(np.random.default_rng((self._seed, epoch, 1)), 0)[place]
        epoch, place = divmod(step - self._short_first, self.epoch_steps)
        plan = self._plan  # read once: a loader's threads may ask for steps of different epochs
        if plan[0] != epoch:
            plan = self._plan = (epoch, self._epoch(epoch))
        return plan[1][place]

    def _collate(self, which: int, chosen: np.ndarray, only: np.ndarray | None = None) -> ProcessBatch:
        shape, rows = self._shapes[which], [self._rows[i] for i in chosen]
        sizes = {"prompt": shape.prompt, "action": shape.action, "candidates": self._candidates}
        return collate(rows, **sizes, pad=self._pad, only=only)

    def _fit(self, sizes: tuple[int, int]) -> int:
        for i, shape in enumerate(self._shapes):
            if sizes[0] <= shape.prompt and sizes[1] <= shape.action:
                return i
        raise InputError("a row fits no bucket", got=sizes, remedy=f"Add a larger one to {self._shapes}.")

    def _epoch(self, epoch: int) -> list[tuple[int, np.ndarray]]:
        rng = np.random.default_rng((self._seed, epoch))
        plan = [(which, rows) for which in range(len(self._shapes)) for rows in self._deal(rng, which)]
        return [plan[i] for i in rng.permutation(len(plan))]

    def _deal(self, rng: np.random.Generator, which: int) -> list[np.ndarray]:
        """A bucket's rows in random order, cut into batches."""
        order, size = rng.permutation(np.array(self._members[which], np.int64)), self._shapes[which].rows
        starts = range(0, len(order), size)
        return [order[np.arange(start, start + size) % len(order)] for start in starts]
