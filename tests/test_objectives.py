"""The objectives: the shared-prompt forward against the copied layout, hand-worked values, torch, and masks."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from array_samples import (
    TIED,
    UNTIED,
    copied_logprobs,
    copied_scores,
    random_batch,
    random_critic,
    random_decoder,
    worst_difference,
)

from jraggym.batch import ProcessBatch
from jraggym.models.likelihood import CHUNK, chunked_logprobs
from jraggym.objectives.critic import critic_loss
from jraggym.objectives.dpo import dpo_loss
from jraggym.objectives.forward import candidate_scores, token_logprobs
from jraggym.objectives.pairs import state_mean, threshold_pairs
from jraggym.objectives.sft import sft_loss

BETA, NLL, CENTRE = 0.5, 0.3, 0.02
logprobs = jax.jit(token_logprobs, static_argnums=(1, 3))


@pytest.fixture(scope="module")
def batch():
    return random_batch(seed=2)


def small_batch(reward, loss_mask=None, candidate_mask=None) -> Any:
    """One-token prompts; only what the losses read matters."""
    reward = np.array(reward, np.float32)
    loss_mask = np.ones((*reward.shape, 2), bool) if loss_mask is None else np.array(loss_mask)
    candidate_mask = np.ones(reward.shape, bool) if candidate_mask is None else np.array(candidate_mask)
    ids = np.zeros(loss_mask.shape, np.int32)
    prompt = np.zeros((len(reward), 1), np.int32)
    fields: Any = (prompt, prompt == 0, ids, loss_mask, loss_mask, reward, candidate_mask, np.float32(ids))
    return ProcessBatch(*fields)


# ---------------------------------------------------------------- shared prompt = copied sequences


def plain_losses(logprob, reference, score, batch):
    """SFT, DPO and the critic's loss over explicit lists of tokens and pairs, straight from their definitions."""
    b, k, _, _ = batch.shape
    real = [(i, j) for i, j in np.ndindex(b, k) if batch.candidate_mask[i, j]]
    good = [at for at in real if batch.reward[at] > 0.75]
    tokens = [(*at, a) for at in good for a in np.flatnonzero(batch.loss_mask[at])]
    sft = -logprob[tuple(np.transpose(tokens))].mean()

    neighbours = [(x, y) for x in real for y in real if x[0] == y[0]]
    judged = [(x, y) for x, y in neighbours if batch.reward[x] > 0.75 and batch.reward[y] < 0.5]
    chosen, rejected = (tuple(np.transpose(side)) for side in zip(*judged, strict=True))
    gain = jnp.einsum("bka,bka->bk", logprob - reference, np.float32(batch.loss_mask))
    dpo = jnp.log1p(jnp.exp(-BETA * (gain[chosen] - gain[rejected]))).mean()

    centring = (score[chosen] + score[rejected]) ** 2
    terms = jnp.log1p(jnp.exp(score[rejected] - score[chosen])) + CENTRE * centring
    states = sorted({x[0] for x, _ in judged})
    critic = sum(terms[chosen[0] == state].mean() for state in states) / len(states)
    return jnp.stack([sft, dpo + NLL * sft, critic])


def library_losses(logprob, reference, score, batch):
    sft, dpo = sft_loss(logprob, batch)[0], dpo_loss(logprob, reference, batch, beta=BETA, nll=NLL)[0]
    return jnp.stack([sft, dpo, critic_loss(score, batch, centre=CENTRE)[0]])


@pytest.mark.parametrize("config", [TIED, UNTIED])
def test_loss_and_every_gradient_equal_those_of_the_copied_layout(config, batch):
    weights = jax.tree.map(jnp.asarray, random_critic(config))  # numpy weights would run the copies in numpy
    reference = np.random.default_rng(0).normal(-3, 1, batch.action.shape).astype(np.float32)

    def shared(w):
        logprob = token_logprobs(w.trunk, config, batch)
        return library_losses(logprob, reference, candidate_scores(w, config, batch), batch)

    def copies(w):
        logprob = copied_logprobs(w.trunk, config, batch)
        return plain_losses(logprob, reference, copied_scores(w, config, batch), batch)

    def losses_and_one_gradient(losses, w, which):
        value, back = jax.vjp(losses, w)
        return value, back(which)[0]

    ours, theirs = (jax.jit(functools.partial(losses_and_one_gradient, losses)) for losses in (shared, copies))
    for which, name in zip(np.eye(3, dtype=np.float32), ("sft", "dpo", "critic"), strict=True):
        (found, gradient), (expected, copied_gradient) = ours(weights, which), theirs(weights, which)
        assert worst_difference(found, expected) < 1e-5
        assert max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(copied_gradient)) > 1e-2, (
            f"{name}: no gradient"
        )
        assert worst_difference(gradient, copied_gradient) < 1e-5, name


# ---------------------------------------------------------------- hand-worked values


def test_golden_sft():
    batch = small_batch([[1.0, 0.75, 0.8]], [[[True, True], [True, True], [True, False]]])
    logprob = jnp.array([[[-1.0, -2.0], [-9.0, -9.0], [-4.0, -9.0]]])
    loss, metrics = sft_loss(logprob, batch)
    assert float(loss) == pytest.approx((1 + 2 + 4) / 3)  # the mean over tokens; 0.75 itself is no positive
    assert metrics["loss"] == loss


def test_golden_dpo():
    batch = small_batch([[0.9, 0.1, 0.6, 0.4]], [[[True, True], [True, False], [True, True], [True, True]]])
    logprob = jnp.array([[[-1.0, -1.0], [-3.0, -7.0], [0.0, 0.0], [-2.0, 0.0]]])
    reference = jnp.array([[[-2.0, -2.0], [-2.0, -1.0], [-5.0, -5.0], [-1.0, -1.0]]])
    # gains: +2 (chosen), -1 and 0 (rejected); 0.6 is neither. margins at beta 0.5: 1.5 and 1
    expected = (np.log1p(np.exp(-1.5)) + np.log1p(np.exp(-1.0))) / 2
    loss, metrics = dpo_loss(logprob, reference, batch, beta=0.5)
    assert float(loss) == pytest.approx(expected, abs=1e-6)
    assert float(metrics["margin"]) == pytest.approx(1.25)
    assert (float(metrics["accuracy"]), float(metrics["pairs"])) == (1.0, 2.0)
    with_nll, _ = dpo_loss(logprob, reference, batch, beta=0.5, nll=0.2)
    assert float(with_nll) == pytest.approx(expected + 0.2 * 1.0, abs=1e-6)  # chosen tokens: -1, -1


def test_golden_critic():
    batch = small_batch([[1.0, 0.4, 0.25]])
    loss, metrics = critic_loss(jnp.array([[1.0, 0.0, 2.0]]), batch, centre=0.01)
    # pairs (0, 1) and (0, 2); the middle of the ranking makes none
    expected = (np.log1p(np.exp(-1.0)) + 0.01 * 1**2 + np.log1p(np.exp(1.0)) + 0.01 * 3**2) / 2
    assert float(loss) == pytest.approx(expected, abs=1e-6)
    assert (float(metrics["accuracy"]), float(metrics["pairs"])) == (0.5, 2.0)
    pointwise, _ = critic_loss(jnp.array([[1.0, 0.0, 2.0]]), batch, centre=0.01, pointwise=0.6)
    asked = np.log1p(np.exp([-1.0, 0.0, 2.0])).mean()  # good, bad, bad
    assert float(pointwise) == pytest.approx(expected + 0.6 * asked, abs=1e-6)


def test_states_count_alike_however_many_pairs_they_have():
    pairs = jnp.array([[[0, 1, 1], [0, 0, 0], [0, 0, 0]], [[0, 1, 0], [0, 0, 0], [0, 0, 0]], jnp.zeros((3, 3))]) > 0
    values = jnp.array([[[9, 1, 3], [9] * 3, [9] * 3], [[9, 6, 9], [9] * 3, [9] * 3], [[jnp.nan] * 3] * 3])
    assert float(state_mean(values, pairs)) == pytest.approx((2 + 6) / 2)
    assert float(state_mean(values, pairs & False)) == 0.0


def test_thresholds_and_ties():
    batch = jax.tree.map(jnp.asarray, small_batch([[0.76, 0.75, 0.5, 0.49]], candidate_mask=[[True] * 4]))
    assert np.argwhere(threshold_pairs(batch)[0]).tolist() == [[0, 3]]
    assert np.argwhere(threshold_pairs(batch, below=0.75)[0]).tolist() == [[0, 2], [0, 3]]
    masked = batch.replace(candidate_mask=np.array([[True, True, True, False]]))
    assert not threshold_pairs(masked).any()


# ---------------------------------------------------------------- identities


def test_dpo_at_the_reference_is_log_two(batch):
    logprob = logprobs(random_decoder(), TIED, batch, None)
    loss, metrics = dpo_loss(logprob, logprob, batch)
    assert float(loss) == pytest.approx(np.log(2), abs=1e-6)
    assert float(metrics["accuracy"]) == 0.0


def test_dpo_equals_torch(batch):
    rng = np.random.default_rng(0)
    logprob, reference = (rng.normal(-2, 1, batch.action.shape).astype(np.float32) for _ in range(2))
    total = torch.tensor(np.where(batch.loss_mask, logprob, 0).sum(-1))
    reference_total = torch.tensor(np.where(batch.loss_mask, reference, 0).sum(-1))
    wanted = []
    for i in range(len(batch.reward)):
        chosen = np.flatnonzero(batch.candidate_mask[i] & (batch.reward[i] > 0.75))
        rejected = np.flatnonzero(batch.candidate_mask[i] & (batch.reward[i] < 0.5))
        for x, y in [(x, y) for x in chosen for y in rejected]:
            ratio, other = total[i, x] - total[i, y], reference_total[i, x] - reference_total[i, y]
            wanted.append(-torch.nn.functional.logsigmoid(0.1 * (ratio - other)))
    loss, metrics = dpo_loss(logprob, reference, batch)
    assert int(metrics["pairs"]) == len(wanted) > 2
    assert float(loss) == pytest.approx(float(torch.stack(wanted).mean()), abs=1e-6)


def test_bradley_terry_ignores_a_shift_and_the_centring_term_is_exact(batch):
    score = np.random.default_rng(0).normal(size=batch.reward.shape).astype(np.float32)
    plain, shifted = (float(critic_loss(s, batch, centre=0.0)[0]) for s in (score, score + 3.0))
    assert plain == pytest.approx(shifted, abs=1e-6)
    totals = (score[:, :, None] + score[:, None, :]).astype(np.float64) ** 2
    pairs = np.asarray(threshold_pairs(batch))
    means = [totals[i][pairs[i]].mean() for i in range(len(pairs)) if pairs[i].any()]
    centred = float(critic_loss(score, batch, centre=0.25)[0])
    assert centred - plain == pytest.approx(0.25 * np.mean(means), rel=1e-5)


# ---------------------------------------------------------------- masks


def losses_and_gradients(batch, logprob, reference, score):
    """All three losses with their gradients by log-probability and by score."""

    def losses(logprob, score):
        return library_losses(logprob, reference, score, batch)

    return losses(logprob, score), *jax.jacrev(losses, (0, 1))(logprob, score)


def test_nan_in_masked_positions_changes_nothing(batch):
    rng = np.random.default_rng(4)
    logprob, reference = (rng.normal(-2, 1, batch.action.shape).astype(np.float32) for _ in range(2))
    score = rng.normal(size=batch.reward.shape).astype(np.float32)
    unread = ~(batch.loss_mask & batch.candidate_mask[..., None])
    unreal = ~batch.candidate_mask
    assert unread[batch.candidate_mask].any()
    assert unreal.any()
    spoiled = batch.replace(reward=np.where(unreal, np.nan, batch.reward))
    run = jax.jit(losses_and_gradients)
    expected = run(batch, logprob, reference, score)
    found = run(spoiled, *(np.where(unread, np.nan, x) for x in (logprob, reference)), np.where(unreal, np.nan, score))
    assert worst_difference(expected, found) < 1e-7


def test_without_pairs_loss_and_gradient_are_zero():
    batch = small_batch([[0.6, 0.6], [0.6, 0.6]])
    logprob = np.full((2, 2, 2), -1.0, np.float32)
    found = jax.jit(losses_and_gradients)(batch, logprob, 2 * logprob, logprob[..., 0])
    assert worst_difference(found, jax.tree.map(np.zeros_like, found)) == 0.0


# ---------------------------------------------------------------- log-probabilities


@pytest.mark.parametrize("tokens", [1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 1])
def test_chunked_log_probabilities_equal_log_softmax(tokens):
    rng = np.random.default_rng(tokens)
    hidden, matrix = rng.normal(size=(tokens, 3)).astype(np.float32), rng.normal(size=(3, 7)).astype(np.float32)
    targets = rng.integers(0, 7, tokens)
    cotangent = rng.normal(size=tokens).astype(np.float32)

    def plain(hidden, matrix):
        return jax.nn.log_softmax(hidden @ matrix, axis=1)[np.arange(tokens), targets]

    def both(function):
        value, back = jax.vjp(function, hidden, matrix)
        return value, back(cotangent)

    found = jax.jit(lambda: both(lambda h, m: chunked_logprobs(h, m, targets)))()
    expected = jax.jit(lambda: both(plain))()
    assert found[0].shape == (tokens,)
    assert worst_difference(found[0], expected[0]) < 1e-5
    assert worst_difference(found[1][0], expected[1][0]) < 1e-5
    np.testing.assert_allclose(found[1][1], expected[1][1], rtol=1e-4, atol=1e-4)  # a sum over all tokens


def test_capacity_bounds_the_tokens_and_too_little_gives_nan(batch):
    weights = random_decoder()
    count = int((batch.loss_mask & batch.action_mask).sum())
    expected = logprobs(weights, TIED, batch, None)
    assert not np.asarray(expected)[~batch.loss_mask].any()
    assert (np.asarray(expected)[batch.loss_mask] < 0).all()
    assert worst_difference(expected, logprobs(weights, TIED, batch, count)) < 1e-6
    short = np.asarray(logprobs(weights, TIED, batch, count - 1))
    assert np.isnan(short).sum() == count - 1, "a cut must not go unseen"
    assert np.isnan(sft_loss(jnp.asarray(short), batch)[0])
