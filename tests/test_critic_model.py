"""The critic's score: the hidden state of an action's last real token times the head, whatever the padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from array_samples import TIED, UNTIED, copied_scores, random_batch, random_critic, worst_difference

from jraggym.objectives.forward import candidate_scores, token_logprobs

scores = jax.jit(candidate_scores, static_argnums=1)


@pytest.mark.parametrize("config", [TIED, UNTIED])
def test_scores_equal_those_of_the_copied_sequences(config):
    weights, batch = random_critic(config), random_batch()
    found = scores(weights, config, batch)
    assert found.shape == batch.reward.shape
    assert found.dtype == jnp.float32
    assert np.std(np.asarray(found)) > 0.1, "the comparison is empty: all scores alike"
    assert worst_difference(found, copied_scores(weights, config, batch)) < 1e-5


def test_padding_does_not_change_a_score():
    weights, batch = random_critic(), random_batch()
    garbage = batch.replace(
        prompt=np.where(batch.prompt_mask, batch.prompt, 1),
        action=np.where(batch.action_mask, batch.action, 2),
    )
    wider = batch.replace(
        prompt=np.pad(batch.prompt, ((0, 0), (3, 0)), constant_values=5),
        prompt_mask=np.pad(batch.prompt_mask, ((0, 0), (3, 0))),
        action=np.pad(batch.action, ((0, 0), (0, 0), (0, 4)), constant_values=5),
        action_mask=np.pad(batch.action_mask, ((0, 0), (0, 0), (0, 4))),
    )
    expected = scores(weights, TIED, batch)
    assert worst_difference(expected, scores(weights, TIED, garbage)) < 1e-6
    assert worst_difference(expected, scores(weights, TIED, wider)) < 1e-5


def test_the_last_real_token_counts_and_the_loss_mask_does_not():
    weights, batch = random_critic(), random_batch()
    expected = np.asarray(scores(weights, TIED, batch))
    last = batch.action_mask.sum(2)[..., None] - 1
    changed = batch.action.copy()
    np.put_along_axis(changed, last, (np.take_along_axis(changed, last, 2) + 1) % 29, 2)
    found = np.asarray(scores(weights, TIED, batch.replace(action=changed)))
    assert np.abs(found - expected).min() > 1e-4
    unread = batch.replace(loss_mask=np.zeros_like(batch.loss_mask))
    assert worst_difference(expected, scores(weights, TIED, unread)) == 0.0


def test_an_empty_action_is_scored_by_the_last_prompt_token():
    weights, batch = random_critic(), random_batch()
    empty = batch.replace(action_mask=np.zeros_like(batch.action_mask))
    found = np.asarray(scores(weights, TIED, empty))
    assert worst_difference(found, copied_scores(weights, TIED, empty)) < 1e-5
    assert np.ptp(found, axis=1).max() < 1e-6, "all candidates are the same empty action"


def test_the_likelihood_term_counts_the_log_probability_of_all_action_tokens():
    weights, batch = random_critic(), random_batch()
    whole = batch.replace(loss_mask=batch.action_mask)
    logprob = token_logprobs(weights.trunk, TIED, whole).sum(-1)
    expected = scores(weights, TIED, batch) + 0.7 * logprob
    assert worst_difference(expected, scores(weights.replace(likelihood=jnp.float32(0.7)), TIED, batch)) < 1e-5
