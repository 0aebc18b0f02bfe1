"""Rollouts of growing transcripts: one jitted program over turns, with retrieval in host callbacks.

while any episode is open:
    sample until enough turns have ended                               on the device, in slots
    read them, say what to retrieve                                    host callback 1: TranscriptEpisodes.act
    embed the queries                                                  on the device
    search, append what came back, let the next episodes in            host callback 2: TranscriptEpisodes.observe
    compute the keys of what is new, behind those of the slot          on the device

An episode's keys stay in its slot, so a turn costs what is new in it. A slot whose episode has ended takes the next
one at once, while the others go on in the middle of their turns. What an episode draws depends on the key and on its
name alone, not on its slot, its neighbours or the number of devices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jraggym.episodes import Retriever
from jraggym.errors import InputError
from jraggym.host_calls import HostCalls
from jraggym.hosts import joined
from jraggym.models.decoder import Decoder, DecoderConfig
from jraggym.models.slots import News, Slots, empty_slots, put_in
from jraggym.sampling import Sampling
from jraggym.sharding import own_rows, place_rows
from jraggym.transcript_episode import TranscriptEpisode, TranscriptRules
from jraggym.transcript_episodes import TranscriptEpisodes
from jraggym.turn_sampling import Sampler, Turns, Work, sample_turns
from jraggym.types import Example


@dataclass(frozen=True)
class Engine:
    """How the device works; nothing here changes what is sampled."""

    slots: int = 32  # episodes at the same time
    patience: float = 0.1  # share of the slots that may wait for the others' turns to end
    piece: int = 32  # tokens decoded before their keys are put behind the slot's own
    rows: int = 1  # slots that are computed together in prefill and read together in decoding: 1 is best on CPU
    width: int = 64  # tokens of a block of prefill

    def __post_init__(self) -> None:
        if min(self.slots, self.piece, self.rows, self.width) < 1 or not 0 <= self.patience < 1:
            raise InputError("sizes must be positive, and 0 <= patience < 1", got=self, remedy="Change them.")


@dataclass(frozen=True)
class Report:
    """What a rollout computed, in tokens where nothing else is said."""

    steps: int  # of decoding, each of all slots of a shard
    offered: int  # places for a token in them
    drawn: int  # places that an open turn drew in
    blocks: int  # of prefill
    prefilled: int

    @property
    def utilisation(self) -> float:
        """The share of decoding that drew a token of an open turn."""
        return self.drawn / max(self.offered, 1)


class TranscriptRollout:
    """Runs episodes of a tag protocol; compiles once."""

    def __init__(
        self,
        config: DecoderConfig,
        rules: TranscriptRules,
        retriever: Retriever,
        sampling: Sampling,
        engine: Engine | None = None,
        *,
        mesh: Mesh | None = None,
    ):
        """`sampling.candidates` and `max_tokens` are not used.

        On a `mesh` the slots are split over all its devices. Each of them runs a loop of its own, holds the weights
        whole and waits for no other; one that cannot hold them needs a serving engine instead.
        """
        engine = engine or Engine()
        if mesh is not None and engine.slots % mesh.size:
            got = f"{engine.slots} slots and {mesh.size} devices"
            raise InputError("the slots cannot be split over the mesh", got=got, remedy="Choose a multiple.")
        self.rules, self._config, self._retriever = rules, config, retriever
        self._sampling, self._engine, self._mesh = sampling, engine, mesh
        self._table = jax.tree.map(jnp.asarray, rules.stop_table())
        self._calls = HostCalls(self._shapes)
        self._run = jax.jit(self._program if mesh is None else self._on_shards(mesh))

    @property
    def compilations(self) -> int:
        """How many programs were compiled so far."""
        return self._run._cache_size()  # type: ignore[attr-defined]

    def run(
        self,
        actor: Decoder,
        examples: Sequence[Example],
        prompts: Sequence[Sequence[int]],
        key: Array,
        *,
        may_search: Sequence[bool] | None = None,
        retriever: Retriever | None = None,
        report: Callable[[int], None] | None = None,
    ) -> tuple[list[TranscriptEpisode], Report]:
        """The episodes of `examples`, which begin with the ids of `prompts`, in order.

        Copies of a question share the keys of its prompt where they stand side by side. A `retriever` with the same
        encoder replaces the rollout's own. `report` gets the number of finished episodes; it must not call jax.
        """
        if may_search is None:
            may_search = [True] * len(examples)
        retriever, slots = retriever or self._retriever, self._engine.slots
        shards = 1 if self._mesh is None else self._mesh.size
        episodes = TranscriptEpisodes(self.rules, examples, prompts, may_search, retriever, slots=slots, shards=shards)
        rows = np.arange(slots, dtype=np.int32)
        where = None if self._mesh is None else NamedSharding(self._mesh, PartitionSpec(self._mesh.axis_names))
        own = rows if where is None else rows[own_rows(where, slots)]

        def after(name: str) -> None:
            if report is not None and name == "observe":
                report(episodes.finished)

        inputs, encoder = (own, *episodes.start(own)), self._retriever.params
        if where is not None:
            inputs = place_rows(inputs, where, slots)
        work = self._calls.run(episodes, lambda: self._run(actor, encoder, key, *inputs), after)
        found = joined(episodes.ended())  # each host ran its own ones
        return [found[i] for i in range(len(examples))], _report(work, slots)

    def _on_shards(self, mesh: Mesh) -> Callable:
        split, whole = PartitionSpec(mesh.axis_names), PartitionSpec()

        def program(actor: Decoder, encoder: Any, key: Array, *inputs: Array) -> Work:
            specs = (whole, whole, whole, *(split for _ in inputs))
            return jax.shard_map(self._program, mesh=mesh, in_specs=specs, out_specs=split, check_vma=False)(
                actor, encoder, key, *inputs
            )

        return program

    def _program(self, actor: Decoder, encoder: Any, key: Array, rows: Array, *first: Array) -> Work:
        """The whole rollout of a shard on the device; the episodes themselves are on the host."""
        engine, limits = self._engine, self.rules.limits
        slots = empty_slots(self._config, rows.shape[0], limits.total + max(engine.piece, engine.width))
        nobody = self._nobody(key, rows.shape[0])
        together, zero = math.gcd(engine.rows, rows.shape[0]), jnp.int32(0)
        how = Sampler(self._config, self._sampling, self._table, engine.piece, together)

        def enter(slots: Slots, turns: Turns, told: Sequence[Array]) -> tuple[Slots, Turns, Work]:
            """What the host says comes into the slots."""
            tokens, count, start, last, donor, changed, opened, limit, name, number = told
            start, last = jnp.where(changed, start, slots.length), jnp.where(changed, last, slots.last)
            news = News(tokens, count, start, last, donor)
            slots, blocks = put_in(actor, self._config, slots, news, engine.rows, engine.width)
            fresh = Turns(
                turns.tokens,
                turns.logprob,
                jnp.where(changed, 0, turns.count),
                jnp.where(changed, limit, turns.limit),
                jnp.where(changed, 0, turns.state),
                jnp.where(changed, opened, turns.open),
                jax.vmap(lambda name: jax.random.fold_in(key, name))(name),
                jnp.where(changed, number, turns.number),
            )
            return slots, fresh, Work(zero, zero, blocks, jnp.sum(count))

        def body(carry: tuple) -> tuple:
            step, slots, turns, work = carry
            was = turns.open
            slots, turns, more = sample_turns(how, actor, slots, turns, self._most(turns))
            stopped = was & ~turns.open
            acted, ids, mask = self._calls("act", step, rows, stopped, turns.tokens, turns.logprob, turns.count)
            vectors = self._retriever.encode(encoder, ids, mask)
            told = self._calls("observe", step, acted, vectors)
            slots, turns, new = enter(slots, turns, told)
            return step + 1, slots, turns, jax.tree.map(lambda *x: sum(x), work, more, new)

        start = (zero, *enter(slots, nobody, first))
        work = jax.lax.while_loop(lambda carry: jnp.any(carry[2].open), body, start)[-1]
        return jax.tree.map(lambda x: x[None], work)  # [shards]

    def _most(self, turns: Turns) -> Array:
        """How many turns may still be open when the others' are read: all but the patient share of those now open."""
        now = jnp.sum(turns.open)
        return now - jnp.maximum(1, (self._engine.patience * now).astype(jnp.int32))

    def _nobody(self, key: Array, b: int) -> Turns:
        a = self.rules.limits.turn
        zeros, none = jnp.zeros(b, jnp.int32), jnp.zeros(b, bool)
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(b))
        return Turns(
            jnp.zeros((b, a), jnp.int32), jnp.zeros((b, a), jnp.float32), zeros, zeros, zeros, none, keys, zeros
        )

    def _shapes(self, name: str, b: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        """What the callback returns for b rows."""
        struct, whole = jax.ShapeDtypeStruct, jax.ShapeDtypeStruct((b,), np.int32)
        if name == "act":
            width = self._retriever.tokenize([""])[0].shape[1]
            return whole, struct((b, width), np.int32), struct((b, width), bool)
        size = max(self.rules.limits.prompt, 2 * self.rules.limits.observation + 1)
        flag = struct((b,), bool)
        return struct((b, size), np.int32), *[whole] * 4, flag, flag, whole, struct((b,), np.uint32), whole


def _report(work: Work, slots: int) -> Report:
    shards = work.steps.shape[0]
    every = {name: int(jnp.sum(x)) for name, x in vars(work).items()}
    return Report(**every, offered=every["steps"] * slots // shards)
