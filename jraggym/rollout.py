"""Rollouts: one jitted program that runs whole episodes, with retrieval in host callbacks.

while any episode is open:
    sample K actions of each prompt  ->  score them (critic)           on the device
    parse, say what to retrieve                                        host callback 1: Episodes.act
    embed the queries                                                  on the device
    search, fuse, judge, execute one candidate, render                 host callback 2: Episodes.observe
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from jraggym.episodes import Episodes, Retriever, Rules
from jraggym.models.critic import Critic, critic_scores
from jraggym.models.decoder import Decoder, DecoderConfig, prefix_forward
from jraggym.sampling import Samples, Sampling, sample
from jraggym.text.actions import STOPS
from jraggym.text.batching import Codec
from jraggym.types import Example, Trajectory


@dataclass(frozen=True)
class Policy:
    """Who acts: the actor's weights and, for best of N, the critic's; both share one configuration."""

    config: DecoderConfig
    actor: Decoder
    critic: Critic | None = None


class Rollout:
    """Runs batches of episodes; compiles once for each (batch size, with or without critic)."""

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
        self._config, self._codec, self._retriever = config, codec, retriever
        self._sampling, self._rules, self._batch, self._mesh = sampling, rules, batch, mesh
        self._stops = jnp.array([codec.tokenizer.token_id(stop) for stop in STOPS])
        self._episodes: Episodes | None = None
        self._run = jax.jit(self._program)

    @property
    def max_turns(self) -> int:
        """The turn budget of an episode."""
        return self._rules.max_turns

    @property
    def compilations(self) -> int:
        """How many programs were compiled so far."""
        return self._run._cache_size()

    def run(
        self,
        policy: Policy,
        examples: Sequence[Example],
        key: Array,
        *,
        rules: Rules | None = None,
        retriever: Retriever | None = None,
    ) -> Iterator[Trajectory]:
        """Yields the episodes of `examples`, in order; a result depends on (key, example), not on the batch.

        Other `rules` (with a judge if and only if the rollout's own have one, and no more turns) and a `retriever`
        with the same encoder live on the host: they replace the rollout's own without a new compilation.
        """
        rules, retriever = rules or self._rules, retriever or self._retriever
        for start in range(0, len(examples), self._batch):
            part = examples[start : start + self._batch]
            self._episodes = Episodes(part, replace(self._codec, max_turns=rules.max_turns), retriever, rules)
            yield from self._run_batch(policy, part, key)

    def _run_batch(self, policy: Policy, examples: Sequence[Example], key: Array) -> list[Trajectory]:
        rows = np.arange(self._batch, dtype=np.int32)
        names = np.array([_stable_hash(e.id) for e in examples] + [0] * (self._batch - len(examples)), np.uint32)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, names)
        prompts = self._episodes.prompts(rows)
        self._run(policy.actor, policy.critic, self._retriever.params, rows, *prompts, keys).block_until_ready()
        return self._episodes.trajectories()

    def _program(
        self,
        actor: Decoder,
        critic: Critic | None,
        encoder: Any,
        rows: Array,
        prompt: Array,
        mask: Array,
        opened: Array,
        keys: Array,
    ) -> Array:
        """The whole rollout on the device; returns the number of turns. The episodes themselves are on the host."""

        def body(carry: tuple) -> tuple:
            turn, prompt, mask, opened = carry
            keys_now = jax.vmap(jax.random.fold_in, (0, None))(keys, turn)
            samples, score = self._propose(actor, critic, prompt, mask, opened, keys_now)
            logprob = jnp.sum(samples.logprob, axis=-1)
            # `acted` is `rows` again: handing it on makes observe wait for act, whatever the encoder does.
            acted, ids, ids_mask = self._call("act", turn, rows, samples.tokens, samples.mask, logprob, score)
            vectors = self._retriever.encode(
                encoder, ids.reshape(-1, ids.shape[-1]), ids_mask.reshape(-1, ids.shape[-1])
            )
            vectors = vectors.reshape(*ids.shape[:2], -1)
            return (turn + 1, *self._call("observe", turn, acted, vectors))

        def go_on(carry: tuple) -> Array:
            return (carry[0] < self._rules.max_turns) & jnp.any(carry[3])

        return jax.lax.while_loop(go_on, body, (jnp.int32(0), prompt, mask, opened))[0]

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

    def _call(self, name: str, turn: Array, rows: Array, *arrays: Array) -> Any:
        """Calls `Episodes.<name>` on the host, on each data shard for its own rows."""

        def on_host(turn: Array, rows: Array, *arrays: Array) -> Any:
            method: Callable = getattr(self._episodes, name)
            return method(int(turn), np.asarray(rows), *map(np.asarray, arrays))

        def on_shard(turn: Array, rows: Array, *arrays: Array) -> Any:
            shapes = self._shapes(name, rows.shape[0])
            return jax.pure_callback(on_host, shapes, turn, rows, *arrays)

        if self._mesh is None:
            return on_shard(turn, rows, *arrays)
        sharded, whole = PartitionSpec("data"), PartitionSpec()
        inputs = (whole, sharded, *(sharded for _ in arrays))
        return jax.shard_map(on_shard, mesh=self._mesh, in_specs=inputs, out_specs=sharded, check_vma=False)(
            turn, rows, *arrays
        )

    def _shapes(self, name: str, b: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        """What the callback returns for b rows."""
        struct = jax.ShapeDtypeStruct
        if name == "act":
            slots = self._sampling.candidates if self._rules.judge else 1
            width = self._retriever.tokenize([""])[0].shape[1]
            return struct((b,), np.int32), struct((b, slots, width), np.int32), struct((b, slots, width), bool)
        size = self._codec.max_prompt
        return struct((b, size), np.int32), struct((b, size), bool), struct((b,), bool)


def _stable_hash(text: str) -> int:
    import zlib

    return zlib.crc32(text.encode())
