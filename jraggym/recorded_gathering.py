"""Fresh experience from recorded states: new replies to chats that an agent was once shown, with a critic's scores.

It is RAG-Gym's PPO (section 2.2.2): actions are generated anew, and nothing is executed. Letters: B slots, K
candidates, P prompt, A action tokens.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh

from jraggym.batch import ProcessBatch
from jraggym.data.lazy import Items
from jraggym.gathering import Gathered, draw
from jraggym.hosts import fetch
from jraggym.models.critic import Critic
from jraggym.models.decoder import Decoder, DecoderConfig, prefix_forward
from jraggym.objectives.forward import candidate_scores
from jraggym.preemption import stop_if_asked
from jraggym.rollout import Policy
from jraggym.sampling import Samples, Sampling, sample
from jraggym.sharding import batch_sharding, own_rows, place_rows
from jraggym.text.batching import EMPTY_ROW, Row, collate


@dataclass(frozen=True)
class RecordedGatherer:
    """Draws recorded prompts and samples K replies to each; a pure function of (weights, iteration).

    A state whose replies all have the same score has no advantage, and is left out.
    """

    prompts: Items[Sequence[int]]  # ids of each state's chat, up to where the assistant begins to write
    stops: tuple[int, ...]  # ids that end a reply
    sampling: Sampling  # K and A
    number: int  # states of an iteration
    slots: int  # of them at a time; on a mesh a multiple of the parts that rows are split into
    longest: int  # P: a longer prompt is left out
    seed: int = 0
    mesh: Mesh | None = None

    def __call__(self, policy: Policy, iteration: int) -> Gathered:
        """The groups of an iteration; the policy has a critic."""
        assert policy.critic is not None
        chosen = draw(range(len(self.prompts)), self.number, iteration, self.seed)
        drawn = [list(self.prompts[number]) for number in chosen]
        fitting = [ids for ids in drawn if len(ids) <= self.longest]
        rows: list[Row] = []
        for at in range(0, len(fitting), self.slots):
            stop_if_asked()
            rows += self._sampled(policy, policy.critic, fitting[at : at + self.slots], (iteration, at))
        scores = np.array([reward for row in rows for reward in row.rewards])
        metrics = {
            "score": float(scores.mean()) if rows else 0.0,
            "reply_tokens": float(np.mean([len(ids) for row in rows for ids in row.actions])) if rows else 0.0,
            "prompts_too_long": float(len(drawn) - len(fitting)),
        }
        groups = [row for row in rows if len(set(row.rewards)) > 1]
        return Gathered(groups, sum(len(ids) for row in rows for ids in row.actions), metrics)

    def _sampled(self, policy: Policy, critic: Critic, prompts: list[list[int]], place: tuple[int, int]) -> list[Row]:
        """A row for each prompt: the replies as they were drawn, token by token, with their scores."""
        real = [replace(EMPTY_ROW, prompt=ids) for ids in prompts]
        batch = self._placed([*real, *[EMPTY_ROW] * (self.slots - len(real))])
        seeds = [zlib.crc32(np.array([self.seed, *place, i], np.int64).tobytes()) for i in range(self.slots)]
        arguments = (np.array(seeds, np.uint32), np.arange(self.slots) < len(real), np.array(self.stops, np.int32))
        found: Samples = fetch(_reply(policy.actor, policy.config, self.sampling, batch, *arguments))
        tokens, mask, logprob = (np.asarray(leaf) for leaf in (found.tokens, found.mask, found.logprob))
        rows = []
        for i, ids in enumerate(prompts):
            actions = [tokens[i, k][mask[i, k]].tolist() for k in range(self.sampling.candidates)]
            own = [[True] * len(action) for action in actions]
            drawn = [logprob[i, k][mask[i, k]].tolist() for k in range(self.sampling.candidates)]
            rows.append(Row(ids, actions, own, [0.0] * len(actions), [bool(action) for action in actions], drawn))
        full = self._placed([*rows, *[EMPTY_ROW] * (self.slots - len(rows))])
        scores = np.asarray(fetch(_scores(critic, policy.config, full, self.mesh)))
        return [replace(row, rewards=line.tolist()) for row, line in zip(rows, scores, strict=False)]

    def _placed(self, rows: Sequence[Row]) -> ProcessBatch:
        """The rows on their devices; each process builds its own."""
        where = None if self.mesh is None else batch_sharding(self.mesh)
        built = rows if where is None else [rows[i] for i in own_rows(where, len(rows))]
        k, a = self.sampling.candidates, self.sampling.max_tokens
        batch = collate(built, prompt=self.longest, action=a, candidates=k)
        return batch if where is None else place_rows(batch, where, len(rows))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _reply(
    weights: Decoder,
    config: DecoderConfig,
    sampling: Sampling,
    batch: ProcessBatch,
    seeds: Array,
    active: Array,
    stops: Array,
) -> Samples:
    prefix = prefix_forward(weights, config, batch.prompt, batch.prompt_mask)
    keys = jax.vmap(jax.random.key)(seeds)
    return sample(weights, config, sampling, prefix, batch.prompt[:, -1], stops, keys, active)


_scores = functools.partial(jax.jit, static_argnums=(1, 3))(candidate_scores)
