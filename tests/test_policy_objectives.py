"""GRPO's and PPO's parts: hand-worked values, torch, the identities that they must obey, and masks."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from array_samples import random_batch, worst_difference
from test_objectives import small_batch

from jraggym.errors import InputError
from jraggym.experience import GRPO, grpo_experience
from jraggym.objectives.advantages import (
    GROUP_ADVANTAGES,
    group_advantages,
    leave_one_out,
    mean_only,
    standardised,
    step_advantages,
    whiten,
)
from jraggym.objectives.gae import gae
from jraggym.objectives.kl import AdaptiveKL, kl_estimate
from jraggym.objectives.policy import Experience, PolicyLoss, aggregate, policy_loss
from jraggym.objectives.ppo import last_own, ppo_experience, token_rewards, value_loss

REWARD = np.float32([[1.0, 0.5, 0.0, 0.5], [0.25, np.nan, 0.75, np.nan], [0.7, np.nan, np.nan, np.nan]])
REAL = np.isfinite(REWARD)


def numbers(shape, seed, low=-3.0, high=0.0):
    return np.random.default_rng(seed).uniform(low, high, shape).astype(np.float32)


@pytest.fixture(scope="module")
def batch():
    return random_batch(seed=7, rows=4, candidates=4, action=10)


@pytest.fixture(scope="module")
def experience(batch):
    """Log-probabilities that differ enough for every clip to act."""
    shape = batch.action.shape
    old = numbers(shape, 1)
    reference, advantage = old + numbers(shape, 2, -0.5, 0.5), numbers(shape, 3, -2, 2)
    batch = batch.replace(behaviour_logprob=old + numbers(shape, 4, -0.8, 0.8))
    return Experience(batch, advantage, old, reference, numbers(shape, 5), numbers(shape, 6))


@pytest.fixture(scope="module")
def logprob(experience):
    return experience.old_logprob + numbers(experience.old_logprob.shape, 8, -0.6, 0.6)


# ---------------------------------------------------------------- advantages


def test_golden_advantages():
    std = np.sqrt((0.25 + 0 + 0.25 + 0) / 3)  # of 1, .5, 0, .5 with ddof 1
    for eps in (1e-6, 1e-4):
        found = standardised(REWARD, REAL, eps=eps)
        np.testing.assert_allclose(found[0], np.array([0.5, 0, -0.5, 0]) / (std + eps), rtol=1e-6)
        np.testing.assert_allclose(found[1], np.array([-0.25, 0, 0.25, 0]) / (np.sqrt(0.125) + eps), rtol=1e-6)
    np.testing.assert_allclose(mean_only(REWARD, REAL)[1], [-0.25, 0, 0.25, 0])
    np.testing.assert_allclose(leave_one_out(REWARD, REAL)[0], [1 - 1 / 3, 0, -2 / 3, 0], atol=1e-7)
    np.testing.assert_allclose(leave_one_out(REWARD, REAL)[1], [-0.5, 0, 0.5, 0])


@pytest.mark.parametrize("advantage", [standardised, mean_only, leave_one_out])
def test_a_group_of_one_keeps_its_reward_and_an_empty_one_is_zero(advantage):
    np.testing.assert_allclose(advantage(REWARD, REAL)[2], [np.float32(0.7), 0, 0, 0])
    assert not np.asarray(advantage(REWARD, np.zeros_like(REAL))).any()


def test_equal_rewards_give_no_advantage():
    same = np.full((1, 4), 0.3, np.float32)
    for advantage in (standardised, mean_only, leave_one_out):
        np.testing.assert_allclose(advantage(same, same > 0), 0, atol=1e-3)


def test_advantages_equal_torch(batch):
    for i, reward in enumerate(batch.reward):
        own = torch.tensor(reward[batch.candidate_mask[i]])
        expected = (own - own.mean()) / (own.std() + 1e-4)
        found = standardised(batch.reward, batch.candidate_mask, eps=1e-4)[i][batch.candidate_mask[i]]
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
        others = torch.stack([own[x] - torch.cat([own[:x], own[x + 1 :]]).mean() for x in range(len(own))])
        found = leave_one_out(batch.reward, batch.candidate_mask)[i][batch.candidate_mask[i]]
        np.testing.assert_allclose(found, others, rtol=1e-5, atol=1e-6)


def test_global_normalisation_is_over_the_tokens_of_all_groups(batch):
    found = np.asarray(group_advantages("global", batch.reward, batch.candidate_mask, batch.loss_mask))
    spread = np.broadcast_to(np.asarray(mean_only(batch.reward, batch.candidate_mask))[..., None], batch.own.shape)
    tokens = spread[batch.own].astype(np.float64)
    np.testing.assert_allclose(found[batch.own], (tokens - tokens.mean()) / tokens.std(), rtol=1e-4, atol=1e-5)
    assert not found[~batch.own].any()


def test_group_advantages_lie_on_the_policys_own_tokens(batch):
    found = np.asarray(group_advantages("mean_only", batch.reward, batch.candidate_mask, batch.own))
    assert not found[~batch.own].any()
    i, k, a = np.argwhere(batch.own)[3]
    assert found[i, k, a] == mean_only(batch.reward, batch.candidate_mask)[i, k]
    with pytest.raises(InputError, match="unknown advantage; got best"):
        group_advantages("best", batch.reward, batch.candidate_mask, batch.own)


def test_whitening_counts_the_mask_alone():
    values, mask = np.float32([1, 3, np.nan, 5, np.inf]), np.array([True, True, False, True, False])
    expected = (np.array([1, 3, 5]) - 3) / np.sqrt(8 / 3)
    np.testing.assert_allclose(np.asarray(whiten(values, mask))[mask], expected, rtol=1e-6)
    assert not np.asarray(whiten(values, mask))[~mask].any()


# ---------------------------------------------------------------- advantages of steps

OWN_STEPS = np.array([[[1, 1, 0, 0, 1, 1], [1, 1, 0, 1, 0, 0], [1, 0, 1, 0, 1, 0], [1, 1, 0, 0, 0, 0]]], bool)
STEP_REWARD = np.float32([[[0, 1, 0, 0, 0, 0], [0, -0.5, 0, 0.5, 0, 0], [0.25, 0, 0, 0, 1, 0], [0, 9, 0, 0, 0, 0]]])
JUDGED = np.array([[True, True, True, False]])
# of each episode: the tokens and the reward of each of its steps
STEPS = [[((0, 1), 1.0), ((4, 5), 0.0)], [((0, 1), -0.5), ((3,), 0.5)], [((0,), 0.25), ((2,), 0.0), ((4,), 1.0)]]


def test_golden_advantages_of_steps():
    own = np.array([[[True, True, False, True], [True, False, False, False]]])
    reward = np.float32([[[0, 1, 0, 0], [0, 0, 0, 0]]])
    found = step_advantages("mean_only", reward, np.ones((1, 2), bool), own)
    np.testing.assert_allclose(found, [[[0.5, 0.5, 0, 0], [-0.5, 0, 0, 0]]], atol=1e-7)


@pytest.mark.parametrize("gamma", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("kind", ["standardised", "mean_only", "leave_one_out"])
def test_a_steps_return_is_set_against_those_of_the_groups_steps_of_the_same_number(kind, gamma):
    returns = []
    for steps in STEPS:
        value, backwards = 0.0, []
        for _, reward in reversed(steps):
            value = reward + gamma * value
            backwards.append(value)
        returns.append(backwards[::-1])
    expected = np.zeros(OWN_STEPS.shape)
    for k, steps in enumerate(STEPS):
        for number, (tokens, _) in enumerate(steps):
            rivals = [(j, values[number]) for j, values in enumerate(returns) if len(values) > number]
            every, others = [v for _, v in rivals], [v for j, v in rivals if j != k]
            if others:
                base = np.mean(others if kind == "leave_one_out" else every)
                scale = np.std(every, ddof=1) + 1e-4 if kind == "standardised" else 1.0
                expected[0, k, list(tokens)] = (returns[k][number] - base) / scale
    found = step_advantages(kind, STEP_REWARD, JUDGED, OWN_STEPS, gamma=gamma, eps=1e-4)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_useless_searches_are_no_worse_than_a_premature_answer():
    own = np.array([[[1, 0, 1, 0, 0], [1, 0, 1, 0, 1], [1, 0, 1, 0, 1]]], bool)
    reward = np.float32([[[0.5, 0, 0, 0, 0], [0.5, 0, 0, 0, 0], [0.5, 0, 0.5, 0, 0]]])
    found = np.asarray(step_advantages("mean_only", reward, np.ones((1, 3), bool), own))[0]
    assert found[0, 2] == found[1, 2] < 0 < found[2, 2]


def test_step_rewards_that_are_all_alike_or_elsewhere_teach_nothing():
    alike = np.where(OWN_STEPS, np.float32(0), np.float32(7))
    for kind in GROUP_ADVANTAGES:
        assert not np.asarray(step_advantages(kind, alike, JUDGED, OWN_STEPS)).any(), kind
    with pytest.raises(InputError, match="unknown advantage; got best"):
        step_advantages("best", alike, JUDGED, OWN_STEPS)


def test_global_advantages_of_steps_are_whitened_over_the_tokens():
    tokens = OWN_STEPS & JUDGED[..., None]
    plain = np.asarray(step_advantages("mean_only", STEP_REWARD, JUDGED, OWN_STEPS))[tokens]
    found = np.asarray(step_advantages("global", STEP_REWARD, JUDGED, OWN_STEPS))
    np.testing.assert_allclose(found[tokens], (plain - plain.mean()) / plain.std(), rtol=1e-5, atol=1e-6)
    assert not found[~tokens].any()


# ---------------------------------------------------------------- KL


def test_golden_estimates():
    d = np.log(2.0)
    found = [float(kl_estimate(kind, jnp.float32(d), jnp.float32(0.0))) for kind in ("k1", "k2", "k3")]
    np.testing.assert_allclose(found, [d, d**2 / 2, 0.5 - 1 + d], rtol=1e-6)
    with pytest.raises(InputError, match="unknown KL estimate; got k4"):
        kl_estimate("k4", jnp.zeros(1), jnp.zeros(1))


def test_what_each_estimate_pulls_towards_as_a_loss():
    """On-policy, by enumeration of a tabular softmax: the sampling weights are constant, the estimate is derived."""
    theta, other = np.random.default_rng(0).normal(size=(2, 7))

    def kl(left, right):
        return jnp.sum(jnp.exp(left) * (left - right))

    def expected_gradient(kind):
        def loss(theta):
            logits = jax.nn.log_softmax(theta)
            return jnp.sum(jax.lax.stop_gradient(jnp.exp(logits)) * kl_estimate(kind, logits, reference))

        return jax.grad(loss)(theta)

    with jax.enable_x64(True):
        theta, other = jnp.asarray(theta), jnp.asarray(other)
        reference = jax.nn.log_softmax(other)
        forward = jax.grad(lambda t: kl(jax.nn.log_softmax(t), reference))(theta)
        backward = jax.grad(lambda t: kl(reference, jax.nn.log_softmax(t)))(theta)
        np.testing.assert_allclose(expected_gradient("k1"), 0, atol=1e-12)
        np.testing.assert_allclose(expected_gradient("k2"), forward, atol=1e-12)
        np.testing.assert_allclose(expected_gradient("k3"), backward, atol=1e-12)
        for kind in ("k1", "k3"):  # and both values are unbiased
            logits = jax.nn.log_softmax(theta)
            found = jnp.sum(jnp.exp(logits) * kl_estimate(kind, logits, reference))
            assert float(found) == pytest.approx(float(kl(logits, reference)), abs=1e-12)
        assert float(jnp.abs(forward - backward).max()) > 0.05, "the two directions must differ"


def test_adaptive_kl_follows_its_target_within_limits_and_keeps_its_floor():
    kl = AdaptiveKL(target=2.0, horizon=100, floor=0.09)
    assert kl.update(0.1, 2.2, 10) == pytest.approx(0.1 * (1 + 0.1 * 10 / 100))
    assert kl.update(0.1, 50.0, 10) == pytest.approx(0.1 * (1 + 0.2 * 10 / 100))
    assert kl.update(0.1, 0.0, 10) == pytest.approx(0.1 * (1 - 0.2 * 10 / 100))
    assert kl.update(0.09, 0.0, 10) == 0.09
    with pytest.raises(InputError, match="adaptive KL"):
        AdaptiveKL(target=-1.0)
    assert AdaptiveKL(floor=0.5).update(0.1, 9.0, 10) == 0.1, "without a target the weight stays"


# ---------------------------------------------------------------- the policy loss


def test_golden_clips():
    batch = small_batch([[1.0, 1.0, 1.0, 1.0]], [[[True, False]] * 4])
    ratio, advantage = np.array([1.5, 0.5, 1.5, 0.5]), np.array([2.0, 2.0, -1.0, -1.0])
    pad = np.zeros((1, 4, 1))
    made = Experience(batch, np.concatenate([advantage[None, :, None], pad], 2), np.zeros((1, 4, 2), np.float32))
    logprob = np.concatenate([np.log(ratio)[None, :, None], pad], 2)

    def losses(how):
        one = dataclasses.replace(made, batch=batch)
        found = []
        for k in range(4):
            mask = np.zeros((1, 4), bool)
            mask[0, k] = True
            alone = dataclasses.replace(one, batch=batch.replace(candidate_mask=mask))
            found.append(float(policy_loss(logprob, alone, how)[0]))
        return found

    # A > 0: capped from above at 1 + high; A < 0: capped from below at 1 - low, and not from above ...
    np.testing.assert_allclose(losses(PolicyLoss()), [-2 * 1.2, -2 * 0.5, 1.5, 0.8], rtol=1e-6)
    np.testing.assert_allclose(losses(PolicyLoss(clip_high=0.4, clip_low=0.6)), [-2.8, -1.0, 1.5, 0.5], rtol=1e-6)
    # ... unless by the dual clip
    np.testing.assert_allclose(losses(PolicyLoss(dual_clip=1.25)), [-2.4, -1.0, 1.25, 0.8], rtol=1e-6)


def test_golden_aggregation():
    losses = jnp.array([[[1.0, 2.0, 9.0], [4.0, 9.0, 9.0], [9.0, 9.0, 9.0]]])
    mask = np.array([[[True, True, False], [True, False, False], [False] * 3]])
    found = [float(aggregate(losses, mask, PolicyLoss(aggregate=kind))) for kind in ("token", "sequence", "fixed")]
    np.testing.assert_allclose(found, [7 / 3, (1.5 + 4) / 2, 7 / (3 * 2)], rtol=1e-6)
    assert float(aggregate(losses, mask, PolicyLoss(aggregate="fixed", length=10))) == pytest.approx(7 / 20)


VARIANTS = [
    PolicyLoss(),
    PolicyLoss(clip_low=0.1, clip_high=0.3, dual_clip=1.5, kl="k1", kl_weight=0.2),
    PolicyLoss(aggregate="sequence", kl="k2", kl_weight=0.3, truncate=1.3),
    PolicyLoss(aggregate="fixed", length=4, kl="k3", kl_weight=0.5, truncate=2.0, dual_clip=3.0),
]


@pytest.mark.parametrize("how", VARIANTS)
def test_policy_loss_equals_torch(experience, logprob, how):
    own = torch.tensor(experience.batch.own)
    new = torch.tensor(logprob, requires_grad=True)
    names = ("advantage", "old_logprob", "reference_logprob")
    advantage, old, reference = (torch.tensor(getattr(experience, name)) for name in names)
    ratio = (new - old).exp()
    terms = torch.max(-advantage * ratio, -advantage * ratio.clamp(1 - how.clip_low, 1 + how.clip_high))
    if how.dual_clip:
        terms = torch.where(advantage < 0, torch.min(terms, -advantage * how.dual_clip), terms)
    if how.truncate:
        terms = terms * (old - torch.tensor(experience.batch.behaviour_logprob)).exp().clamp(max=how.truncate)
    d = new - reference
    terms = terms + how.kl_weight * {"k1": d, "k2": d**2 / 2, "k3": (-d).exp() - 1 + d}[how.kl]
    sequences = [terms[i, k][own[i, k]] for i, k in np.ndindex(own.shape[:2]) if own[i, k].any()]
    expected = {
        "token": torch.cat(sequences).mean(),
        "sequence": torch.stack([s.mean() for s in sequences]).mean(),
        "fixed": torch.cat(sequences).sum() / (4 * len(sequences)),
    }[how.aggregate]
    expected.backward()
    (found, metrics), gradient = jax.value_and_grad(lambda x: policy_loss(x, experience, how), has_aux=True)(logprob)
    assert float(found) == pytest.approx(expected.item(), abs=1e-5)
    assert worst_difference(gradient, new.grad.numpy()) < 1e-5
    assert 0 < float(metrics["clipped"]) < 1


def test_the_first_inner_step_is_reinforce(experience):
    old = experience.old_logprob

    def reinforce(logprob):
        own = experience.batch.own
        return -jnp.sum(jnp.where(own, experience.advantage * logprob, 0.0)) / jnp.sum(own)

    for how in (PolicyLoss(), PolicyLoss(clip_high=0.3, dual_clip=2.0)):
        found = jax.grad(lambda x, how=how: policy_loss(x, experience, how)[0])(old)
        assert worst_difference(found, jax.grad(reinforce)(old)) < 1e-6


def test_entropy_lowers_the_loss(experience, logprob):
    entropy = numbers(logprob.shape, 9, 0, 2)
    plain = policy_loss(logprob, experience, PolicyLoss())[0]
    found, metrics = policy_loss(logprob, experience, PolicyLoss(entropy_weight=0.1), jnp.asarray(entropy))
    mean = entropy[experience.batch.own].mean()
    assert float(found) == pytest.approx(float(plain) - 0.1 * mean, abs=1e-5)
    assert float(metrics["entropy"]) == pytest.approx(mean, abs=1e-5)


@pytest.mark.parametrize(
    "how",
    [{"aggregate": "mean"}, {"kl": "k9"}, {"clip_low": 1.5}, {"clip_high": -0.1}, {"dual_clip": 0.5}],
)
def test_a_variant_that_does_not_exist_is_refused(how):
    with pytest.raises(InputError, match=next(iter(how))):
        PolicyLoss(**how)


def test_a_kl_term_needs_a_reference(experience, logprob):
    bare = dataclasses.replace(experience, reference_logprob=None)
    with pytest.raises(InputError, match="a KL term needs a reference"):
        policy_loss(logprob, bare, PolicyLoss(kl_weight=0.1))
    assert "kl_reference" not in policy_loss(logprob, bare, PolicyLoss())[1]


# ---------------------------------------------------------------- GAE


def test_golden_gae():
    reward, value = jnp.array([0.0, 0.0, 1.0]), jnp.array([0.5, 0.2, 0.4])
    last = 1.0 - 0.4
    middle = 0.9 * 0.4 - 0.2 + 0.9 * 0.8 * last
    first = 0.9 * 0.2 - 0.5 + 0.9 * 0.8 * middle
    advantage, returns = gae(reward, value, jnp.ones(3, bool), gamma=0.9, lam=0.8)
    np.testing.assert_allclose(advantage, [first, middle, last], rtol=1e-6)
    np.testing.assert_allclose(returns, np.array([first, middle, last]) + value, rtol=1e-6)


def test_without_discount_the_advantage_is_return_minus_value(batch, experience):
    reward = numbers(batch.action.shape, 10, -1, 1)
    advantage, returns = (np.asarray(x) for x in gae(reward, experience.value, batch.own))
    for i, k in np.ndindex(batch.reward.shape):
        own = batch.own[i, k]
        to_go = np.cumsum(reward[i, k][own][::-1])[::-1]
        np.testing.assert_allclose(returns[i, k][own], to_go, atol=1e-5)
        np.testing.assert_allclose(advantage[i, k][own], to_go - experience.value[i, k][own], atol=1e-5)


def test_skipping_observations_equals_deleting_them(batch, experience):
    reward, how = numbers(batch.action.shape, 11, -1, 1), {"gamma": 0.93, "lam": 0.7}
    advantage = np.asarray(gae(reward, experience.value, batch.own, **how)[0])
    holes = 0
    for i, k in np.ndindex(batch.reward.shape):
        own = batch.own[i, k]
        holes += int((~own[: own.nonzero()[0].max(initial=0)]).sum())
        alone = gae(reward[i, k][own], experience.value[i, k][own], np.ones(own.sum(), bool), **how)[0]
        np.testing.assert_allclose(advantage[i, k][own], alone, atol=1e-6)
        assert not advantage[i, k][~own].any()
    assert holes > 3, "the batch must have observations between the policy's tokens"


# ---------------------------------------------------------------- PPO


def test_rewards_stand_on_the_last_own_token_and_stay_floats():
    mask = [[[True, True, False], [True, False, True], [False, False, False]]]
    batch = small_batch([[0.3, 0.6, 0.9]], mask)
    found = token_rewards(batch, np.zeros((1, 3, 3)), None, kl="k1", weight=jnp.float32(0))
    np.testing.assert_allclose(found, [[[0, 0.3, 0], [0, 0, 0.6], [0, 0, 0]]], rtol=1e-6)
    assert found.dtype == np.float32
    steps = batch.replace(token_reward=np.float32([[[0.25, 0.5, 9.0], [0.125, 9.0, 1.0], [9.0, 9.0, 9.0]]]))
    logprob = np.float32([[[-1.0, -2.0, np.nan], [-1.5, np.nan, -0.5], [np.nan] * 3]])
    found = token_rewards(steps, logprob, logprob - 0.5, kl="k1", weight=jnp.float32(0.1))
    np.testing.assert_allclose(found[0, :2], [[0.2, 0.45 + 0.3, 0], [0.075, 0, 0.95 + 0.6]], atol=1e-6)
    assert np.asarray(last_own(np.array(mask))).sum(-1).tolist() == [[1, 1, 0]]


def test_ppo_experience_is_whitened_gae(batch, experience):
    reward = np.asarray(token_rewards(batch, experience.old_logprob, None, kl="k1", weight=jnp.float32(0)))
    value = experience.value
    made = ppo_experience(batch, reward, value, experience.old_logprob, None, 1.0, 0.95)
    advantage, returns = (np.asarray(x) for x in gae(reward, value, batch.own, lam=0.95))
    own = advantage[batch.own].astype(np.float64)
    np.testing.assert_allclose(np.asarray(made.advantage)[batch.own], (own - own.mean()) / own.std(), atol=1e-4)
    np.testing.assert_allclose(made.returns, returns)
    np.testing.assert_allclose(made.value, value)


def test_leaky_ppo_reads_inserted_tokens_and_the_policy_loss_does_not():
    # own, inserted, own, padding; by hand with gamma = lambda = 1: an advantage is the reward to come minus the value
    batch = small_batch([[1.0]], [[[True, False, True, False]]])
    batch = batch.replace(action_mask=np.array([[[True, True, True, False]]]))
    value = np.float32([[[0.25, 0.75, 0.5, 9.0]]])
    reward = np.float32([[[0.0, 0.0, 1.0, 9.0]]])
    zero = np.zeros((1, 1, 4), np.float32)
    makes = [ppo_experience(batch, reward, value, zero, None, 1.0, 1.0, leaky) for leaky in (False, True)]
    for made, places, advantages in zip(makes, ([0, 2], [0, 1, 2]), ([0.75, 0.5], [0.75, 0.25, 0.5]), strict=True):
        by_hand = (np.array(advantages) - np.mean(advantages)) / np.std(advantages)
        np.testing.assert_allclose(np.asarray(made.advantage)[0, 0, places], by_hand, atol=1e-4)
        np.testing.assert_allclose(np.asarray(made.returns)[0, 0, places], 1.0)
        assert float(made.advantage[0, 0, 3]) == float(made.returns[0, 0, 3]) == 0.0
    plain = float(value_loss(value, makes[1], clip=0.0)[0])
    assert plain == pytest.approx(0.5 * (0.75**2 + 0.5**2) / 2)
    assert float(value_loss(value, makes[1], clip=0.0, leaky=True)[0]) == pytest.approx(
        0.5 * (0.75**2 + 0.25**2 + 0.5**2) / 3
    )
    logprob = np.float32([[[0.1, 5.0, -0.1, 5.0]]])
    other = makes[1].replace(advantage=makes[1].advantage.at[0, 0, 1].set(np.nan))
    assert float(policy_loss(logprob, makes[1], PolicyLoss())[0]) == float(policy_loss(logprob, other, PolicyLoss())[0])


def test_golden_value_loss():
    batch = small_batch([[1.0]], [[[True, True, False]]])
    zero = np.zeros((1, 1, 3), np.float32)
    made = Experience(batch, zero, zero, None, value=zero + 1, returns=np.float32([[[2.0, 0.0, 9.0]]]))
    value = jnp.array([[[1.5, 1.5, 9.0]]])
    # without a limit: 1/2 mean(0.25, 2.25); within 0.2 of the old 1.0 both count as 1.2, and the worse error counts
    assert float(value_loss(value, made, clip=0.0)[0]) == pytest.approx(0.5 * (0.25 + 2.25) / 2)
    assert float(value_loss(value, made, clip=0.2)[0]) == pytest.approx(0.5 * (0.8**2 + 1.5**2) / 2)


@pytest.mark.parametrize("clip", [0.0, 0.25])
def test_value_loss_equals_torch(batch, experience, clip):
    own = torch.tensor(batch.own)
    new = torch.tensor(experience.value + numbers(batch.action.shape, 12, -1, 1), requires_grad=True)
    old, returns = torch.tensor(experience.value), torch.tensor(experience.returns)
    terms = (new - returns) ** 2
    if clip:
        terms = torch.max(terms, (torch.min(torch.max(new, old - clip), old + clip) - returns) ** 2)
    expected = 0.5 * terms[own].mean()
    expected.backward()
    found, gradient = jax.value_and_grad(lambda v: value_loss(v, experience, clip=clip)[0])(new.detach().numpy())
    assert float(found) == pytest.approx(expected.item(), abs=1e-5)
    assert worst_difference(gradient, new.grad.numpy()) < 1e-5


def test_explained_variance_is_one_for_the_returns_and_zero_for_a_constant(experience):
    for value, share in ((experience.returns, 1.0), (np.full_like(experience.returns, 0.3), 0.0)):
        assert float(value_loss(value, experience)[1]["explained"]) == pytest.approx(share, abs=1e-5)


# ---------------------------------------------------------------- masks


def spoiled(experience: Any, bad: float) -> Any:
    """The same experience with `bad` wherever no policy token of a real candidate stands."""
    own = experience.batch.own

    def spoil(x):
        return np.where(own, x, np.float32(bad))

    batch = experience.batch.replace(
        behaviour_logprob=spoil(experience.batch.behaviour_logprob),
        reward=np.where(experience.batch.candidate_mask, experience.batch.reward, np.float32(bad)),
    )
    rest = {f.name: spoil(getattr(experience, f.name)) for f in dataclasses.fields(experience) if f.name != "batch"}
    return Experience(batch, **rest)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_masked_changes_no_bit_of_loss_and_gradient(experience, logprob, bad):
    how = PolicyLoss(dual_clip=2.0, kl_weight=0.1, truncate=1.5, entropy_weight=0.01)

    @jax.jit
    def run(logprob, value, experience, entropy):
        def losses(logprob, value, entropy):
            made = ppo_experience(
                experience.batch,
                token_rewards(experience.batch, logprob, experience.reference_logprob, kl="k3", weight=0.1),
                experience.value,
                logprob,
                experience.reference_logprob,
                1.0,
                0.9,
            )
            group = group_advantages("global", experience.batch.reward, experience.batch.candidate_mask, made.batch.own)
            parts = policy_loss(logprob, experience, how, entropy)[0], value_loss(value, experience)[0]
            return sum(parts) + jnp.sum(made.advantage**3) + jnp.sum(group**3)

        return jax.value_and_grad(losses, (0, 1, 2))(logprob, value, entropy)

    own = experience.batch.own
    assert (~own).any()
    expected = run(logprob, experience.value + 0.1, experience, logprob**2)
    arrays = [np.where(own, x, np.float32(bad)) for x in (logprob, experience.value + 0.1, logprob**2)]
    found = run(arrays[0], arrays[1], spoiled(experience, bad), arrays[2])
    assert worst_difference(found, expected) == 0.0


@pytest.mark.parametrize("gamma", [1.0, 0.0])
def test_grpo_adds_the_advantages_of_steps_to_those_of_the_outcome(batch, gamma):
    steps = np.where(batch.own, numbers(batch.own.shape, 21), 0.0).astype(np.float32)
    batch = batch.replace(token_reward=steps)
    net: Any = SimpleNamespace(decoder=lambda *_: None, logprobs=lambda _, batch: jnp.zeros(batch.action.shape))
    made, _ = grpo_experience(net, GRPO("mean_only", gamma=gamma))(None, None, batch)
    group = batch.candidate_mask, batch.own
    outcome = group_advantages("mean_only", batch.reward, *group)
    added = step_advantages("mean_only", steps, *group, gamma=gamma)
    np.testing.assert_allclose(made.advantage, outcome + added, atol=1e-6)
    assert np.abs(np.asarray(added)).max() > 0.1
