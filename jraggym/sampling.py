"""Sampling K actions of each prompt from one prefill.

Letters: B batch, P prompt tokens, K candidates, A action tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from jraggym.errors import InputError
from jraggym.models.attention import soft_cap
from jraggym.models.decoder import (
    Decoder,
    DecoderConfig,
    Prefix,
    decode_step,
    empty_cache,
    unembedding,
)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How actions are drawn; temperature 0 is greedy (all K alike), top_k 0 and top_p 1 truncate nothing."""

    candidates: int = 1
    max_tokens: int = 20
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.candidates < 1 or self.max_tokens < 1:
            raise InputError("candidates and max_tokens must be positive", got=self, remedy="Raise them.")
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise InputError("temperature >= 0, top_k >= 0 and 0 < top_p <= 1", got=self, remedy="Change them.")


@struct.dataclass
class Samples:
    """Sampled actions, the stop token included."""

    tokens: Array  # int32 [B, K, A]
    mask: Array  # bool [B, K, A]
    logprob: Array  # f32 [B, K, A]  of the policy itself, before temperature and truncation, in nats


@struct.dataclass
class _Decoding:
    """The state of the decoding loop."""

    step: Array  # int32, tokens decoded so far
    token: Array  # int32 [B, K], the token to feed next
    open: Array  # bool [B, K], no stop token yet
    cache: tuple[Array, Array]  # keys and values of the branches
    samples: Samples


def sample(
    weights: Decoder,
    config: DecoderConfig,
    sampling: Sampling,
    prefix: Prefix,
    start: Array,
    stops: Array,
    keys: Array,
    active: Array | None = None,
) -> Samples:
    """Draws K actions of each prompt, each up to and with its first stop token.

    Args: prefix: the prompts, prefilled; start int32 [B]: their last tokens; stops int32 [X]: token ids that end
      an action; keys: a PRNG key [B] for each prompt, so that a draw does not depend on the rest of the batch;
      active bool [B]: rows that matter (the loop ends when all of these have stopped; default all).
    """
    b, k, a = start.shape[0], sampling.candidates, sampling.max_tokens
    matrix = unembedding(weights).astype(config.dtype)
    opened = jnp.broadcast_to((jnp.ones(b, bool) if active is None else active)[:, None], (b, k))
    blank = Samples(jnp.zeros((b, k, a), jnp.int32), jnp.zeros((b, k, a), bool), jnp.zeros((b, k, a), jnp.float32))
    first = _Decoding(
        jnp.int32(0), jnp.repeat(start[:, None], k, axis=1), opened, empty_cache(config, prefix, k, a), blank
    )

    def body(now: _Decoding) -> _Decoding:
        hidden, cache = decode_step(weights, config, prefix, now.cache, now.step, now.token)
        logits = soft_cap((hidden @ matrix).astype(jnp.float32), config.final_cap)
        token = draw(logits, sampling, jax.vmap(jax.random.fold_in, (0, None))(keys, now.step))
        chosen = jnp.take_along_axis(logits, token[..., None], axis=-1)[..., 0]
        logprob = chosen - jax.nn.logsumexp(logits, axis=-1)
        old = now.samples
        samples = Samples(
            old.tokens.at[:, :, now.step].set(jnp.where(now.open, token, 0)),
            old.mask.at[:, :, now.step].set(now.open),
            old.logprob.at[:, :, now.step].set(jnp.where(now.open, logprob, 0.0)),
        )
        still = now.open & ~jnp.isin(token, stops)
        return _Decoding(now.step + 1, token, still, cache, samples)

    return jax.lax.while_loop(lambda now: (now.step < a) & jnp.any(now.open), body, first).samples


def draw(logits: Array, sampling: Sampling, keys: Array) -> Array:
    """One token [B, K] from logits [B, K, V], with one key for each of the B rows.

    By inversion of the distribution function: one random number for each draw, where Gumbel noise takes V.
    """
    if sampling.temperature == 0.0:
        return _likeliest(logits)
    logits = truncate(logits / sampling.temperature, sampling)
    mass = jnp.cumsum(jax.nn.softmax(logits, axis=-1), axis=-1)
    uniform = 1.0 - jax.vmap(lambda key: jax.random.uniform(key, logits.shape[1:2]))(keys)  # in (0, 1]
    # The first token whose mass reaches the threshold: its own probability is not 0.
    return jnp.sum(mass < (uniform * mass[..., -1])[..., None], axis=-1).astype(jnp.int32)


def _likeliest(logits: Array) -> Array:
    """argmax as two plain reductions, on CPU six times as fast as its one reduction of (value, index) pairs."""
    rank, top = jnp.arange(logits.shape[-1], dtype=jnp.int32), jnp.max(logits, axis=-1, keepdims=True)
    return jnp.min(jnp.where(logits < top, logits.shape[-1] - 1, rank), axis=-1)


def truncate(logits: Array, sampling: Sampling) -> Array:
    """Sets logits outside the top k, and outside the smallest set of probability >= top_p, to -inf."""
    if sampling.top_k and sampling.top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, sampling.top_k)[0][..., -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if sampling.top_p < 1.0:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probability = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(probability, axis=-1) - probability  # mass of all likelier tokens
        least = jnp.min(jnp.where(before < sampling.top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits
