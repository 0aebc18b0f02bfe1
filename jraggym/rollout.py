"""Rollouts: one jitted program that runs whole episodes, with retrieval in host callbacks.

while any episode is open:
    sample K actions of each prompt  ->  score them (critic)           on the device
    parse, say what to retrieve                                        host callback 1: Episodes.act
    embed the queries                                                  on the device
    search, fuse, judge, execute one candidate, render                 host callback 2: Episodes.observe

On a mesh the rows are split over its "data" axis, and each of its shards calls the host for its own rows.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jraggym.episodes import Episodes, Retriever, Rules
from jraggym.errors import InputError
from jraggym.models.critic import Critic, critic_scores
from jraggym.models.decoder import Decoder, DecoderConfig, prefix_forward
from jraggym.sampling import Samples, Sampling, sample
from jraggym.sharding import batch_sharding, place
from jraggym.text.actions import STOPS
from jraggym.text.batching import Codec
from jraggym.types import Example, Trajectory

# Bytes of a callback's operand. JAX hands operands over as arrays of its own, and those above 100 KB are filled by
# the very threads that wait in the callbacks: with as many devices as threads, none is left to do it.
PIECE = 1 << 16


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
        if mesh is not None and batch % mesh.shape["data"]:
            got = f"batch {batch} and data={mesh.shape['data']}"
            raise InputError("the batch cannot be split over the mesh", got=got, remedy="Choose a multiple.")
        self._config, self._codec, self._retriever = config, codec, retriever
        self._sampling, self._rules, self._batch, self._mesh = sampling, rules, batch, mesh
        self._stops = jnp.array([codec.tokenizer.token_id(stop) for stop in STOPS])
        whole = None if mesh is None else NamedSharding(mesh, PartitionSpec())
        self._encoder = retriever.params if whole is None else place(retriever.params, whole)
        self._episodes: Episodes | None = None
        self._failure: Exception | None = None
        self._run = jax.jit(self._program)

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
    ) -> Iterator[Trajectory]:
        """Yields the episodes of `examples`, in order; a result depends on (key, example), not on the batch.

        Other `rules` (with a judge if and only if the rollout's own have one, and no more turns) and a `retriever`
        with the same encoder live on the host: they replace the rollout's own without a new compilation.
        """
        rules, retriever = rules or self._rules, retriever or self._retriever
        if rules.max_turns > self.max_turns or (rules.judge is None) != (self._rules.judge is None):
            remedy = f"Use at most {self.max_turns} turns, and a judge if and only if the rollout has one."
            raise InputError("these rules do not fit the compiled rollout", got=rules, remedy=remedy)
        for start in range(0, len(examples), self._batch):
            part = examples[start : start + self._batch]
            codec = replace(self._codec, max_turns=rules.max_turns)
            yield from self._run_batch(policy, Episodes(part, codec, retriever, rules), key)

    def _run_batch(self, policy: Policy, episodes: Episodes, key: Array) -> list[Trajectory]:
        rows, names = np.arange(self._batch, dtype=np.int32), np.zeros(self._batch, np.uint32)
        names[: len(episodes.examples)] = [zlib.crc32(example.id.encode()) for example in episodes.examples]
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, names)
        inputs = (rows, *episodes.prompts(rows), keys)
        if self._mesh is not None:
            inputs = place(inputs, batch_sharding(self._mesh))
        self._episodes, self._failure = episodes, None
        self._run(policy.actor, policy.critic, self._encoder, *inputs).block_until_ready()
        if self._failure is not None:
            raise self._failure
        return episodes.trajectories()

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
            b, slots, width = ids.shape  # width 0 without an encoder
            flat = (b * slots, width)
            vectors = self._retriever.encode(encoder, ids.reshape(flat), ids_mask.reshape(flat))
            vectors = vectors.reshape(b, slots, vectors.shape[-1])
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

        def on_shard(turn: Array, rows: Array, *arrays: Array) -> Any:
            results = self._shapes(name, rows.shape[0])
            on_host = partial(self._on_host, name, results, [x.shape for x in arrays])
            return jax.pure_callback(on_host, results, turn, rows, *map(_pieces, arrays))

        if self._mesh is None:
            return on_shard(turn, rows, *arrays)
        sharded, whole = PartitionSpec("data"), PartitionSpec()
        inputs = (whole, sharded, *(sharded for _ in arrays))
        return jax.shard_map(on_shard, mesh=self._mesh, in_specs=inputs, out_specs=sharded, check_vma=False)(
            turn, rows, *arrays
        )

    def _on_host(self, name: str, results: Sequence[Any], shapes: Sequence[tuple], turn, rows, *pieces) -> Any:
        """Puts the operands together again and calls `Episodes.<name>`.

        A failure is kept for `run` to raise, and every row closes: an exception here would leave other shards waiting.
        """
        if self._failure is None:
            try:
                arrays = [np.concatenate([*map(np.asarray, p)]).reshape(s) for p, s in zip(pieces, shapes, strict=True)]
                method: Callable = getattr(self._episodes, name)
                return method(int(turn), np.asarray(rows), *arrays)
            except Exception as failure:
                self._failure = self._failure or failure
        return tuple(np.zeros(result.shape, result.dtype) for result in results)

    def _shapes(self, name: str, b: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        """What the callback returns for b rows."""
        struct = jax.ShapeDtypeStruct
        if name == "act":
            slots = self._sampling.candidates if self._rules.judge else 1
            width = self._retriever.tokenize([""])[0].shape[1]
            return struct((b,), np.int32), struct((b, slots, width), np.int32), struct((b, slots, width), bool)
        size = self._codec.max_prompt
        return struct((b, size), np.int32), struct((b, size), bool), struct((b,), bool)


def _pieces(x: Array) -> list[Array]:
    """The array as flat pieces of at most `PIECE` bytes."""
    return jnp.array_split(x.reshape(-1), max(1, -(-x.size * x.dtype.itemsize // PIECE)))
