"""Rollouts: one jitted program that runs whole episodes, with retrieval in host callbacks.

while any episode is open:                                       (a finished one's row takes the next episode)
    sample K actions of each prompt  ->  score them (critic)           on the device
    parse, say what to retrieve                                        host callback 1: Episodes.act
    embed the queries                                                  on the device
    search, fuse, judge, execute one candidate, render                 host callback 2: Episodes.observe

On a mesh the rows are split over its "data" and "fsdp" axes, and each shard calls the host for its own rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from jraggym.episodes import Episodes, Retriever, Rules
from jraggym.errors import InputError
from jraggym.host_calls import HostCalls
from jraggym.hosts import joined
from jraggym.models.critic import Critic, critic_scores
from jraggym.models.decoder import Decoder, DecoderConfig, prefix_forward
from jraggym.sampling import Samples, Sampling, sample
from jraggym.sharding import batch_sharding, batch_shards, own_rows, place, place_rows, whole_on
from jraggym.text.batching import Codec
from jraggym.types import Example, State, Trajectory


@dataclass(frozen=True)
class Policy:
    """Who acts: the actor's weights and, for best of N, the critic's; both share one configuration."""

    config: DecoderConfig
    actor: Decoder
    critic: Critic | None = None


class Rollout:
    """Runs batches of episodes; compiles once for each (batch size, with or without critic).

    With a `mesh` (see sharding.make_mesh) the policy's weights are either placed on it or on no device in particular.
    """

    def __init__(
        self,
        config: DecoderConfig,
        codec: Codec,
        retriever: Retriever,
        sampling: Sampling,
        rules: Rules,
        *,
        batch: int = 64,
        mesh: Mesh | None = None,
    ):
        if mesh is not None and batch % batch_shards(mesh):
            got = f"batch {batch} and {batch_shards(mesh)} shards of rows"
            raise InputError("the batch cannot be split over the mesh", got=got, remedy="Choose a multiple.")
        self._config, self._codec, self._retriever = config, codec, retriever
        self._sampling, self._rules, self._batch, self._mesh = sampling, rules, batch, mesh
        self._stops = jnp.array(codec.stops)
        self._calls = HostCalls(self._shapes, mesh)
        self._run = jax.jit(self._program)

    @functools.cached_property
    def _encoder(self) -> Any:
        params = self._retriever.params
        return params if self._mesh is None else place(params, whole_on(self._mesh))

    @property
    def max_turns(self) -> int:
        """The turn budget of an episode."""
        return self._rules.max_turns

    @property
    def compilations(self) -> int:
        """How many programs were compiled so far."""
        return self._run._cache_size()  # type: ignore[attr-defined]

    def run(
        self,
        policy: Policy,
        examples: Sequence[Example],
        key: Array,
        *,
        rules: Rules | None = None,
        retriever: Retriever | None = None,
        report: Callable[[int], None] | None = None,
        starts: Sequence[State] | None = None,
    ) -> list[Trajectory]:
        """The episodes of `examples`, in order; a result depends on (key, example), not on the batch.

        With `starts`, one open state for each example, the episodes go on from there, and their steps begin there.
        Other `rules` (with a judge if and only if the rollout's own have one, and no more turns) and a `retriever`
        with the same encoder live on the host: they replace the rollout's own without a new compilation. `report` gets
        the number of finished episodes at each step; it runs in a callback, so it must not call jax.
        """
        rules, retriever = rules or self._rules, retriever or self._retriever
        if rules.max_turns > self.max_turns or (rules.judge is None) != (self._rules.judge is None):
            remedy = f"Use at most {self.max_turns} turns, and a judge if and only if the rollout has one."
            raise InputError("these rules do not fit the compiled rollout", got=rules, remedy=remedy)
        codec, shards = replace(self._codec, max_turns=rules.max_turns), 1
        if self._mesh is not None:
            shards = batch_shards(self._mesh)
        episodes = Episodes(examples, codec, retriever, rules, slots=self._batch, shards=shards, starts=starts)
        rows = np.arange(self._batch, dtype=np.int32)
        if self._mesh is None:
            inputs = (rows, *episodes.prompts(rows))
        else:
            where = batch_sharding(self._mesh)
            own = rows[own_rows(where, self._batch)]
            inputs = place_rows((own, *episodes.prompts(own)), where, self._batch)

        def after(name: str) -> None:
            if report is not None and name == "observe":
                report(episodes.finished)

        self._calls.run(episodes, lambda: self._run(policy.actor, policy.critic, self._encoder, key, *inputs), after)
        found = joined({i: t for i, t in enumerate(episodes.trajectories()) if t.steps})  # each host ran its own ones
        return [found[i] for i in range(len(examples))]

    def trace(self, policy: Policy, encoder: Any, key: Any) -> Any:
        """The rollout's program for abstract arrays (`encoder` is what `retriever.params` would be), to be compiled."""
        where = None if self._mesh is None else batch_sharding(self._mesh)
        shapes = (jax.ShapeDtypeStruct((self._batch,), np.int32), *self._shapes("observe", self._batch))
        inputs = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where) for x in shapes]
        return self._run.trace(policy.actor, policy.critic, encoder, key, *inputs)

    def _program(
        self, actor: Decoder, critic: Critic | None, encoder: Any, key: Array, rows: Array, *prompts: Array
    ) -> Array:
        """The whole rollout on the device; returns the number of steps. The episodes themselves are on the host."""

        def body(carry: tuple) -> tuple:
            step, prompt, mask, opened, name, turn = carry
            keys = jax.vmap(lambda name, turn: jax.random.fold_in(jax.random.fold_in(key, name), turn))(name, turn)
            samples, score = self._propose(actor, critic, prompt, mask, opened, keys)
            # `acted` is `rows` again: handing it on makes observe wait for act, whatever the encoder does.
            acted, ids, ids_mask = self._calls("act", step, rows, samples.tokens, samples.mask, samples.logprob, score)
            b, slots, width = ids.shape  # width 0 without an encoder
            flat = (b * slots, width)
            vectors = self._retriever.encode(encoder, ids.reshape(flat), ids_mask.reshape(flat))
            vectors = vectors.reshape(b, slots, vectors.shape[-1])
            return (step + 1, *self._calls("observe", step, acted, vectors))

        def go_on(carry: tuple) -> Array:
            return jnp.any(carry[3])

        return jax.lax.while_loop(go_on, body, (jnp.int32(0), *prompts))[0]

    def _propose(
        self, actor: Decoder, critic: Critic | None, prompt: Array, mask: Array, opened: Array, keys: Array
    ) -> tuple[Samples, Array]:
        """K sampled actions of each prompt and their critic scores [B, K] (0 without a critic)."""
        prefix, start = prefix_forward(actor, self._config, prompt, mask), prompt[:, -1]
        samples = sample(actor, self._config, self._sampling, prefix, start, self._stops, keys, opened)
        if critic is None:
            return samples, jnp.zeros(samples.tokens.shape[:2])
        prefix = prefix_forward(critic.trunk, self._config, prompt, mask)
        first = jnp.broadcast_to(start[:, None, None], (*samples.tokens.shape[:2], 1))
        tokens = jnp.concatenate([first, samples.tokens], axis=2)
        return samples, critic_scores(
            critic, self._config, prefix, tokens, jnp.pad(samples.mask, ((0, 0), (0, 0), (1, 0)), constant_values=True)
        )

    def _shapes(self, name: str, b: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        """What the callback returns for b rows."""
        struct = jax.ShapeDtypeStruct
        if name == "act":
            slots = self._sampling.candidates if self._rules.judge else 1
            width = self._retriever.tokenize([""])[0].shape[1]
            return struct((b,), np.int32), struct((b, slots, width), np.int32), struct((b, slots, width), bool)
        size = self._codec.max_prompt
        prompts = struct((b, size), np.int32), struct((b, size), bool)
        return *prompts, struct((b,), bool), struct((b,), np.uint32), struct((b,), np.int32)
