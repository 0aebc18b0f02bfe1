"""DPO on K candidates of each state: the shared prompt beside every pair written out as two full sequences.

    python tests/benchmarks/training.py [--prompts 128 256] [--rows 2] [--repeats 3]

Both layouts run in this process on the same batch and weights, through the same decoder, optimiser and chunked
vocabulary product; neither computes logits for prompt tokens. Prints the tokens that pass through the model in one
step (policy and reference alike), tokens and steps per second (best of the repeats), their ratios and the difference
between both losses. Nothing is asserted on time: the figures depend on the machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax import Array

from jraggym.batch import ProcessBatch
from jraggym.models.decoder import (
    Decoder,
    DecoderConfig,
    branch_forward,
    init,
    prefix_forward,
    specs,
    unembedding,
)
from jraggym.models.likelihood import chunked_logprobs
from jraggym.objectives.dpo import dpo_loss
from jraggym.objectives.forward import token_logprobs
from jraggym.training import Metrics, Step, init_state

BETA = 0.1
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Config:
    """Sizes; the model is the default tiny one."""

    prompts: tuple[int, ...] = (128, 256)
    rows: int = 2  # states in the batch
    candidates: int = 8  # half of them good, half bad
    action: int = 20
    repeats: int = 3


class Copies(NamedTuple):
    """Every (chosen, rejected) pair as two sequences behind own copies of the prompt, padded on the right."""

    ids: np.ndarray  # int32 [2, X, T], T = P + A; row 0 chosen, row 1 rejected
    mask: np.ndarray  # bool [2, X, T]
    wanted: np.ndarray  # bool [2, X, T]: action tokens


def make_batch(config: Config, prompt: int, vocab: int) -> ProcessBatch:
    """Random ids: prompts of three quarters to full length, actions of half to full length."""
    rng = np.random.default_rng(prompt)
    b, k, a = config.rows, config.candidates, config.action
    lengths, sizes = rng.integers(3 * prompt // 4, prompt + 1, b), rng.integers(a // 2, a + 1, (b, k))
    action_mask = np.arange(a) < sizes[..., None]
    reward = np.tile(np.arange(k) % 2, (b, 1)).astype(np.float32)
    fields: dict[str, Any] = {
        "prompt": rng.integers(0, vocab, (b, prompt), dtype=np.int32),
        "prompt_mask": np.arange(prompt) >= prompt - lengths[:, None],
        "action": rng.integers(0, vocab, (b, k, a), dtype=np.int32),
        "action_mask": action_mask,
        "loss_mask": action_mask,
        "reward": reward,
        "candidate_mask": np.ones((b, k), bool),
        "behaviour_logprob": np.zeros((b, k, a), np.float32),
    }
    return ProcessBatch(**fields)


def write_out(batch: ProcessBatch) -> Copies:
    """The reference layout: positives x negatives of each state."""
    b, k, p, a = batch.shape
    pairs = [
        (i, x, y)
        for i in range(b)
        for x, y in np.ndindex(k, k)
        if batch.reward[i, x] > 0.75 and batch.reward[i, y] < 0.5
    ]
    copies = Copies(*(np.zeros((2, len(pairs), p + a), kind) for kind in (np.int32, bool, bool)))
    for row, (i, *pair) in enumerate(pairs):
        prompt = batch.prompt[i][batch.prompt_mask[i]]
        for side, j in enumerate(pair):
            ids = np.concatenate([prompt, batch.action[i, j][batch.action_mask[i, j]]])
            copies.ids[side, row, : len(ids)] = ids
            copies.mask[side, row, : len(ids)] = True
            copies.wanted[side, row, len(prompt) : len(ids)] = True
    return copies


def sequence_logprobs(weights: Decoder, config: DecoderConfig, copies: Copies) -> Array:
    """Summed log-probabilities [2, X] of the action tokens of each written-out sequence, in nats.

    A plain causal pass: each sequence is the only branch behind a prefix of one masked token.
    """
    sides, count, t = copies.ids.shape
    ids, mask = (jnp.asarray(leaf).reshape(sides * count, 1, t) for leaf in (copies.ids, copies.mask))
    before = jnp.concatenate([ids[:, 0, :1]] * 2, axis=1)
    prefix = prefix_forward(weights, config, before, jnp.array([[False, True]]).repeat(len(before), axis=0))
    hidden = branch_forward(weights, config, prefix, ids, mask)[:, :, :-1]
    place = np.flatnonzero(copies.wanted[:, :, 1:])
    rows = hidden.reshape(-1, config.model)[place]
    found = chunked_logprobs(rows, unembedding(weights), ids[:, :, 1:].reshape(-1)[place])
    return jnp.zeros(sides * count).at[place // (t - 1)].add(found).reshape(sides, count)


def shared_objective(config: DecoderConfig, capacity: int) -> Callable:
    """DPO through the library: (weights, batch, frozen, key) -> (loss, metrics)."""

    def objective(weights: Decoder, batch: ProcessBatch, frozen: Decoder, key: Array) -> tuple[Array, Metrics]:
        logprob = token_logprobs(weights, config, batch, capacity)
        reference = token_logprobs(frozen, config, batch, capacity)
        return dpo_loss(logprob, reference, batch, beta=BETA)

    return objective


def copied_objective(config: DecoderConfig, copies: Copies) -> Callable:
    """DPO on written-out pairs: (weights, batch, frozen, key) -> (loss, metrics)."""

    def objective(weights: Decoder, batch: ProcessBatch, frozen: Decoder, key: Array) -> tuple[Array, Metrics]:
        gain = sequence_logprobs(weights, config, copies) - sequence_logprobs(frozen, config, copies)
        loss = -jnp.mean(jax.nn.log_sigmoid(BETA * (gain[0] - gain[1])))
        return loss, {"loss": loss}

    return objective


def measure(
    objective: Callable, batch: ProcessBatch, weights: Decoder, frozen: Decoder, repeats: int
) -> tuple[float, float]:
    """(loss of the first step, best seconds per step) of AdamW steps; the first one compiles and is not timed."""
    optimizer = optax.adamw(1e-3)
    step = Step(objective, optimizer)
    state, metrics = step(init_state(weights, optimizer), batch, frozen)
    loss, best = float(metrics["loss"]), float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        state, metrics = step(state, batch, frozen)
        jax.block_until_ready((state, metrics))
        best = min(best, time.perf_counter() - start)
    return loss, best


def compare(config: Config, prompt: int, model: DecoderConfig) -> None:
    """Measures both layouts at one prompt length and prints them."""
    weights, frozen = (jax.jit(lambda key: init(specs(model), key))(jax.random.key(seed)) for seed in (0, 1))
    batch = make_batch(config, prompt, model.vocab)
    copies = write_out(batch)
    b, k, _, a = batch.shape
    objectives = {
        "shared prompt": (shared_objective(model, int(batch.loss_mask.sum())), b * (prompt - 1 + k * (a + 1))),
        "pairs written out": (copied_objective(model, copies), copies.ids.size),
    }
    print(f"\nprompt {prompt}, {b} states, {k} candidates of at most {a} tokens, {copies.ids.shape[1]} pairs")
    print(f"  {'layout':<18} {'tokens/step':>12} {'tokens/s':>10} {'steps/s':>9}")
    results = {}
    for name, (objective, tokens) in objectives.items():
        loss, seconds = measure(objective, batch, weights, frozen, config.repeats)
        results[name] = loss, tokens, seconds
        print(f"  {name:<18} {tokens:>12,} {tokens / seconds:>10,.0f} {1 / seconds:>9.3f}", flush=True)
    (loss, tokens, seconds), (other_loss, other_tokens, other_seconds) = results.values()
    difference = abs(loss - other_loss)
    print(f"  shared prompt: {other_tokens / tokens:.1f} x fewer tokens, {other_seconds / seconds:.1f} x more steps/s")
    print(f"  losses {loss:.7f} and {other_loss:.7f}, difference {difference:.1e}")
    if not difference < TOLERANCE:
        raise SystemExit(f"the layouts disagree: {difference:.1e} is not below {TOLERANCE:.0e}")


def main() -> None:
    config = tyro.cli(Config, description=__doc__)
    for prompt in config.prompts:
        compare(config, prompt, DecoderConfig())


if __name__ == "__main__":
    main()
