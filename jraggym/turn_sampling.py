"""Sampling turns in slots: each slot draws until its turn ends, and none waits long for the others.

Letters: B slots, A tokens of a turn, C tokens of a piece, E automaton states, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from jraggym.models.attention import soft_cap
from jraggym.models.decoder import Decoder, DecoderConfig, unembedding
from jraggym.models.slots import Slots, empty_piece, merge, slots_step
from jraggym.sampling import Sampling, draw
from jraggym.text.stop_strings import StopTable


@struct.dataclass
class Turns:
    """What each slot draws in its present turn."""

    tokens: Array  # int32 [B, A]
    logprob: Array  # f32 [B, A]  of the policy itself, before temperature and truncation, in nats
    count: Array  # int32 [B]  drawn in this turn
    limit: Array  # int32 [B]  how many may be drawn in it, at most A
    state: Array  # int32 [B]  of the automaton that finds the turn's end
    open: Array  # bool [B]  the turn goes on
    key: Array  # a PRNG key [B] of each episode: with the draw's number it decides the draw
    number: Array  # int32 [B]  of the episode's next draw


@struct.dataclass
class Work:
    """What was computed, int32 each."""

    steps: Array  # of decoding, each of all slots
    drawn: Array  # tokens of open turns
    blocks: Array  # of prefill
    prefilled: Array  # tokens


@dataclass(frozen=True)
class Sampler:
    """How turns are drawn: by which model, with what truncation, and how many tokens and slots at a time."""

    config: DecoderConfig
    sampling: Sampling
    table: StopTable  # what ends a turn
    piece: int  # tokens decoded before their keys go behind the slot's own
    rows: int  # slots whose keys are read together; divides their number


def sample_turns(how: Sampler, weights: Decoder, slots: Slots, turns: Turns, most: Array) -> tuple[Slots, Turns, Work]:
    """Draws in all open turns, until at most `most` of them are still open.

    The keys of a piece lie side by side in a small cache of their own before they go behind each slot's own. A cache
    needs `piece` slots more than its longest text.
    """

    def going(carry: tuple) -> Array:
        return jnp.sum(carry[1].open) > most

    def go(carry: tuple) -> tuple:
        slots, turns, steps = carry
        turns_after, (k, v), last, taken = _piece(how, weights, slots, turns, most)
        return merge(slots, k, v, turns_after.count - turns.count, last), turns_after, steps + taken

    before = jnp.sum(turns.count)
    slots, turns, steps = jax.lax.while_loop(going, go, (slots, turns, jnp.int32(0)))
    return slots, turns, Work(steps, jnp.sum(turns.count) - before, jnp.int32(0), jnp.int32(0))


def _piece(
    how: Sampler, weights: Decoder, slots: Slots, turns: Turns, most: Array
) -> tuple[Turns, tuple[Array, Array], Array, Array]:
    """At most `piece` tokens: the turns, the keys and values [N, B, G, C, H], the next tokens, the steps taken."""
    config, table = how.config, how.table
    matrix, every = unembedding(weights).astype(config.dtype), jnp.arange(slots.length.shape[0])

    def going(carry: tuple) -> Array:
        step, turns, *_ = carry
        return (step < how.piece) & (jnp.sum(turns.open) > most)

    def go(carry: tuple) -> tuple:
        step, turns, token, cache = carry
        hidden, cache = slots_step(weights, config, slots, turns.open, cache, step, token, how.rows)
        logits = soft_cap((hidden[:, None] @ matrix).astype(jnp.float32), config.final_cap)
        drawn = draw(logits, how.sampling, jax.vmap(jax.random.fold_in)(turns.key, turns.number))[:, 0]
        logits = logits[:, 0]
        logprob = jnp.take_along_axis(logits, drawn[:, None], axis=-1)[:, 0] - jax.nn.logsumexp(logits, axis=-1)
        place = jnp.where(turns.open, turns.count, turns.tokens.shape[1])  # out of range: written nowhere
        count, state = turns.count + turns.open, table.step[turns.state, drawn].astype(jnp.int32)
        state = jnp.where(turns.open, state, turns.state)
        after = Turns(
            turns.tokens.at[every, place].set(drawn, mode="drop"),
            turns.logprob.at[every, place].set(logprob, mode="drop"),
            count,
            turns.limit,
            state,
            turns.open & ~table.done[state] & (count < turns.limit),
            turns.key,
            turns.number + turns.open,
        )
        return step + 1, after, jnp.where(turns.open, drawn, token), cache

    cache = empty_piece(config, slots, how.piece)
    steps, turns, last, cache = jax.lax.while_loop(going, go, (jnp.int32(0), turns, slots.last, cache))
    return turns, cache, last, steps
