"""SFT's, DPO's and the critic's variants: hand-worked values, torch, invariances, and agreement with the labels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from array_samples import random_batch, worst_difference
from test_objectives import small_batch

from jraggym.objectives.agreement import BINS, agreement
from jraggym.objectives.critic import bradley_terry_loss, critic_loss, plackett_luce_loss, pointwise_loss
from jraggym.objectives.dpo import dpo_loss
from jraggym.objectives.pairs import ordered_pairs, threshold_pairs
from jraggym.objectives.sft import sft_loss


@pytest.fixture(scope="module")
def batch():
    return random_batch(seed=6, rows=4, candidates=6)


@pytest.fixture(scope="module")
def arrays(batch):
    """Log-probabilities, reference log-probabilities and scores."""
    rng = np.random.default_rng(1)
    logprob, reference = (rng.normal(-2, 1, batch.action.shape).astype(np.float32) for _ in range(2))
    return logprob, reference, rng.normal(size=batch.reward.shape).astype(np.float32)


# ---------------------------------------------------------------- SFT


def test_golden_reward_weighted_sft():
    batch = small_batch([[1.0, 0.5, 0.0]], [[[True, True], [True, False], [True, True]]])
    logprob = jnp.array([[[-1.0, -2.0], [-4.0, -9.0], [-8.0, -8.0]]])
    # weights 1, 1 | 0.5 | 0, 0 and losses 1, 2 | 4 | 8, 8
    assert float(sft_loss(logprob, batch, weighted=True)[0]) == pytest.approx((1 + 2 + 0.5 * 4) / 2.5)
    nothing = batch.replace(reward=np.zeros((1, 3), np.float32))
    assert float(sft_loss(logprob, nothing, weighted=True)[0]) == 0.0


def test_with_rewards_of_one_the_weighted_loss_is_the_plain_one(batch, arrays):
    ones = batch.replace(reward=np.ones_like(batch.reward))
    assert float(sft_loss(arrays[0], ones, weighted=True)[0]) == pytest.approx(float(sft_loss(arrays[0], ones)[0]))


# ---------------------------------------------------------------- DPO


def test_golden_variants_of_dpo():
    batch = small_batch([[0.9, 0.1]], [[[True, True], [True, False]]])
    logprob, reference = jnp.array([[[-1.0, -1.0], [-3.0, -7.0]]]), jnp.array([[[-2.0, -2.0], [-2.0, -1.0]]])
    # gains: 2 over two tokens, and -1 over one; h = 3, per token 1 + 1 = 2
    ipo, _ = dpo_loss(logprob, reference, batch, beta=0.25, ipo=True)
    assert float(ipo) == pytest.approx((3 - 1 / 0.5) ** 2)
    ipo, _ = dpo_loss(logprob, reference, batch, beta=0.25, ipo=True, per_token=True)
    assert float(ipo) == pytest.approx((2 - 1 / 0.5) ** 2)
    smooth, _ = dpo_loss(logprob, reference, batch, beta=0.5, smoothing=0.1)
    assert float(smooth) == pytest.approx(0.9 * np.log1p(np.exp(-1.5)) + 0.1 * np.log1p(np.exp(1.5)), abs=1e-6)
    short, metrics = dpo_loss(logprob, reference, batch, beta=0.5, per_token=True)
    assert float(short) == pytest.approx(np.log1p(np.exp(-1.0)), abs=1e-6)
    assert float(metrics["margin"]) == pytest.approx(1.0)


@pytest.mark.parametrize(
    "how", [{"ipo": True}, {"ipo": True, "per_token": True}, {"smoothing": 0.2}, {"per_token": True}]
)
def test_variants_of_dpo_equal_torch(batch, arrays, how):
    own = torch.tensor(batch.own)
    logprob = torch.tensor(arrays[0], requires_grad=True)
    count = own.sum(-1) if how.get("per_token") else torch.ones(())
    side = [torch.where(own, x, 0).sum(-1) / count for x in (logprob, torch.tensor(arrays[1]))]
    losses = []
    for i, x, y in np.argwhere(threshold_pairs(batch)):
        h = (side[0][i, x] - side[0][i, y]) - (side[1][i, x] - side[1][i, y])
        if how.get("ipo"):
            losses.append((h - 1 / (2 * 0.3)) ** 2)
        else:
            flip = how.get("smoothing", 0.0)
            sigmoid = torch.nn.functional.logsigmoid
            losses.append(-sigmoid(0.3 * h) * (1 - flip) - sigmoid(-0.3 * h) * flip)
    expected = torch.stack(losses).mean()
    expected.backward()
    found, gradient = jax.value_and_grad(lambda x: dpo_loss(x, arrays[1], batch, beta=0.3, **how)[0])(arrays[0])
    assert len(losses) > 3
    assert float(found) == pytest.approx(expected.item(), abs=1e-5)
    assert worst_difference(gradient, logprob.grad.numpy()) < 1e-5


# ---------------------------------------------------------------- the critic


def test_golden_plackett_luce():
    batch = small_batch([[1.0, 0.5, 0.25]])
    a, b, c = 1.0, -0.5, 2.0
    first = -np.log(np.exp(a) / (np.exp(a) + np.exp(b) + np.exp(c)))
    second = -np.log(np.exp(b) / (np.exp(b) + np.exp(c)))
    found = plackett_luce_loss(jnp.array([[a, b, c]]), batch)  # the last one has no choice to make
    assert float(found) == pytest.approx((first + second) / 2, abs=1e-6)


def test_ties_do_not_compete_and_two_candidates_are_a_bradley_terry_pair():
    batch = small_batch([[1.0, 1.0, 0.25]])
    score = jnp.array([[0.3, 1.7, -1.0]])
    each = [np.log1p(np.exp(-1.0 - s)) for s in (0.3, 1.7)]  # each of the two against the third alone
    assert float(plackett_luce_loss(score, batch)) == pytest.approx(np.mean(each), abs=1e-6)
    two = small_batch([[0.2, 0.9]])
    pair = bradley_terry_loss(score[:, :2], ordered_pairs(two))
    assert float(plackett_luce_loss(score[:, :2], two)) == pytest.approx(float(pair), abs=1e-6)
    assert float(plackett_luce_loss(score, small_batch([[0.5, 0.5, 0.5]]))) == 0.0


def test_plackett_luce_equals_torch(batch, arrays):
    scores = torch.tensor(arrays[2], requires_grad=True)
    states = []
    for i in range(len(batch.reward)):
        real = np.flatnonzero(batch.candidate_mask[i])
        factors = []
        for x in real:
            worse = [y for y in real if batch.reward[i, y] < batch.reward[i, x]]
            if worse:
                factors.append(-torch.log_softmax(scores[i, [x, *worse]], dim=0)[0])
        if factors:
            states.append(torch.stack(factors).mean())
    expected = torch.stack(states).mean()
    expected.backward()
    found, gradient = jax.value_and_grad(lambda s: plackett_luce_loss(s, batch))(arrays[2])
    assert float(found) == pytest.approx(expected.item(), abs=1e-5)
    assert worst_difference(gradient, scores.grad.numpy()) < 1e-5


def test_a_shift_of_a_states_scores_changes_neither_ranking_loss(batch, arrays):
    shift = np.float32([[3.0], [-2.0], [0.5], [7.0]])
    for loss in (lambda s: plackett_luce_loss(s, batch), lambda s: bradley_terry_loss(s, ordered_pairs(batch))):
        assert float(loss(arrays[2])) == pytest.approx(float(loss(arrays[2] + shift)), abs=1e-5)


def test_golden_pointwise_loss():
    score, target = jnp.array([[np.log(3.0), 0.0, 7.0]]), np.float32([[0.5, 1.0, 0.0]])  # sigmoids 3/4 and 1/2
    wanted = (-0.5 * np.log(0.75) - 0.5 * np.log(0.25) - np.log(0.5)) / 2
    found = pointwise_loss(score, target, np.array([[True, True, False]]))
    assert float(found) == pytest.approx(wanted, abs=1e-6)


def test_pointwise_soft_labels_equal_torch(batch, arrays):
    scores = torch.tensor(arrays[2], requires_grad=True)
    mask = torch.tensor(batch.candidate_mask)
    cross = torch.nn.functional.binary_cross_entropy_with_logits
    expected = cross(scores[mask], torch.tensor(batch.reward)[mask])
    expected.backward()
    found, gradient = jax.value_and_grad(lambda s: pointwise_loss(s, batch.reward, batch.candidate_mask))(arrays[2])
    assert float(found) == pytest.approx(expected.item(), abs=1e-6)
    assert worst_difference(gradient, scores.grad.numpy()) < 1e-6


def test_the_critics_loss_is_the_weighted_sum_of_its_parts(batch, arrays):
    score, pairs = arrays[2], threshold_pairs(batch)
    parts = [
        bradley_terry_loss(score, pairs, centre=0.02),
        plackett_luce_loss(score, batch),
        pointwise_loss(score, batch.reward, batch.candidate_mask),
    ]
    found, _ = critic_loss(score, batch, pairwise=0.5, listwise=2.0, pointwise=3.0, centre=0.02, soft=True)
    assert float(found) == pytest.approx(float(0.5 * parts[0] + 2.0 * parts[1] + 3.0 * parts[2]), rel=1e-6)


def test_nan_at_masked_candidates_changes_no_bit_of_loss_and_gradient(batch, arrays):
    unreal = ~batch.candidate_mask
    spoiled = batch.replace(reward=np.where(unreal, np.nan, batch.reward))

    @jax.jit
    def run(score, batch):
        return jax.value_and_grad(lambda s: critic_loss(s, batch, listwise=1.0, pointwise=1.0, soft=True)[0])(score)

    found = run(np.where(unreal, np.nan, arrays[2]), spoiled)
    for bad in (np.inf, -np.inf):
        assert worst_difference(run(np.where(unreal, bad, arrays[2]), batch), found) == 0.0
    assert worst_difference(run(arrays[2], batch), found) == 0.0
    assert unreal.any()


# ---------------------------------------------------------------- agreement


def test_golden_agreement():
    batch = small_batch([[1.0, 0.5, 1 / 3]])
    found = agreement(jnp.array([[2.0, -1.0, 0.0]]), batch)
    # ranks 0, 1, 2: pairs (0, 1) and (1, 2) at distance 1, of which the second is wrong, and (0, 2) at distance 2
    assert found.pairs.tolist() == [0, 2, 1]
    assert found.right.tolist() == [0, 1, 1]
    summary = found.summary()
    assert summary["accuracy"] == pytest.approx(2 / 3)
    assert summary["by_distance"] == {1: 0.5, 2: 1.0}
    sure = 1 / (1 + np.exp(-np.array([3.0, 1.0, 2.0])))  # 0.95, 0.73 and 0.88 lie in bins of their own
    wanted = (abs(1 - sure[0]) + abs(0 - sure[1]) + abs(1 - sure[2])) / 3
    assert summary["calibration_error"] == pytest.approx(wanted, abs=1e-6)


def test_agreement_adds_up_over_batches_and_counts_ties_as_halves(batch, arrays):
    halves = [jax.tree.map(lambda x, part=part: x[part], (arrays[2], batch)) for part in (slice(0, 2), slice(2, 4))]
    total = agreement(*halves[0]) + agreement(*halves[1])
    assert worst_difference(total, agreement(arrays[2], batch)) < 1e-5
    assert int(total.binned.sum()) == int(total.pairs.sum()) == int(np.asarray(ordered_pairs(batch)).sum())
    flat = agreement(np.zeros_like(arrays[2]), batch)
    assert flat.summary()["accuracy"] == pytest.approx(0.5)
    assert flat.summary()["calibration_error"] == pytest.approx(0.0, abs=1e-6)
    assert len(flat.binned) == BINS


def test_agreement_of_nothing_is_refused():
    with pytest.raises(ValueError, match="no pair"):
        agreement(jnp.zeros((1, 2)), small_batch([[0.5, 0.5]])).summary()
