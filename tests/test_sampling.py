"""Sampling against naive loops: greedy, stops, truncation, the distribution, keys and compilations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from array_samples import TIED, UNTIED, causal_logprobs, copied_logprobs, random_batch, random_decoder, worst_difference
from scipy.stats import chisquare

from jraggym.errors import InputError
from jraggym.models.decoder import prefix_forward
from jraggym.sampling import Sampling, draw, sample, truncate

STOPS = np.array([3, 11, 17], np.int32)


def keys_of(seed, rows):
    return jax.random.split(jax.random.key(seed), rows)


def run(weights, config, sampling, batch, stops, keys, active=None):
    prefix = prefix_forward(weights, config, batch.prompt, batch.prompt_mask)
    return sample(weights, config, sampling, prefix, batch.prompt[:, -1], stops, keys, active)


jitted = jax.jit(run, static_argnums=(1, 2))


def as_batch(batch, samples):
    """The sampled actions as a batch whose every real token counts."""
    tokens, mask = np.asarray(samples.tokens), np.asarray(samples.mask)
    return batch.replace(action=tokens, action_mask=mask, loss_mask=mask)


@pytest.fixture(scope="module")
def drawn():
    """(batch, weights, samples) at temperature 1, with about two tokens before a stop."""
    batch, weights = random_batch(rows=4), random_decoder()
    return batch, weights, jitted(weights, TIED, Sampling(6, 9), batch, STOPS, keys_of(0, 4), np.ones(4, bool))


@pytest.mark.parametrize("config", [TIED, UNTIED])
def test_greedy_equals_a_naive_loop_that_recomputes_the_whole_sequence(config):
    batch, weights = random_batch(rows=3), random_decoder(config, seed=5)
    samples = jitted(weights, config, Sampling(2, 8, temperature=0.0), batch, STOPS, keys_of(0, 3))
    lengths = []
    for i in range(3):
        ids = list(batch.prompt[i][batch.prompt_mask[i]])
        action: list[int] = []
        while len(action) < 8 and not (action and action[-1] in STOPS):
            action.append(int(causal_logprobs(weights, config, np.array(ids + action))[-1].argmax()))
        expected = action + [0] * (8 - len(action))
        for k in range(2):  # greedy candidates are all alike
            assert list(np.asarray(samples.tokens[i, k])) == expected, (i, k)
            assert list(np.asarray(samples.mask[i, k])) == [j < len(action) for j in range(8)], (i, k)
        lengths.append(len(action))
    assert max(lengths) > 1, "the comparison is empty"


def test_log_probabilities_are_those_of_the_training_forward(drawn):
    batch, weights, samples = drawn
    mask = np.asarray(samples.mask)
    expected = np.where(mask, copied_logprobs(weights, TIED, as_batch(batch, samples)), 0)
    assert worst_difference(samples.logprob, expected) < 1e-5
    tempered = jitted(weights, TIED, Sampling(6, 9, 0.5, top_k=4, top_p=0.9), batch, STOPS, keys_of(0, 4))
    expected = np.where(tempered.mask, copied_logprobs(weights, TIED, as_batch(batch, tempered)), 0)
    assert worst_difference(tempered.logprob, expected) < 1e-5, "the policy's own log-probability, not the drawn one"


def test_an_action_ends_with_its_first_stop_token(drawn):
    _, _, samples = drawn
    tokens, mask = np.asarray(samples.tokens), np.asarray(samples.mask)
    lengths = set()
    for row, real in zip(tokens.reshape(-1, 9), mask.reshape(-1, 9), strict=True):
        stops = np.flatnonzero(np.isin(row, STOPS) & real)
        length = stops[0] + 1 if len(stops) else 9
        assert list(real) == [j < length for j in range(9)]
        assert not row[length:].any(), "tokens after the stop must be blank"
        lengths.add(int(length))
    assert len(lengths) > 3, f"the test saw too few lengths: {lengths}"
    assert len({tuple(row) for row in tokens[0]}) > 2, "candidates must differ"


def test_inactive_rows_stay_blank_and_do_not_keep_the_loop_going(drawn):
    batch, weights, whole = drawn
    active = np.array([True, False, True, False])
    samples = jitted(weights, TIED, Sampling(6, 9), batch, STOPS, keys_of(0, 4), active)
    for name in ("tokens", "mask", "logprob"):
        found, expected = np.asarray(getattr(samples, name)), np.asarray(getattr(whole, name))
        assert not found[~active].any(), name
        np.testing.assert_allclose(found[active], expected[active], atol=1e-6)


def test_a_draw_does_not_depend_on_the_rest_of_the_batch(drawn):
    batch, weights, whole = drawn
    keys = keys_of(0, 4)
    for i in (1, 3):
        alone = jitted(
            weights,
            TIED,
            Sampling(6, 9),
            jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], batch),
            STOPS,
            keys[i : i + 1],
        )
        assert np.array_equal(alone.tokens[0], whole.tokens[i]), i
        assert np.array_equal(alone.mask[0], whole.mask[i]), i


def test_same_key_same_sample_and_one_compilation():
    traced = []

    def counted(weights, batch, stops, keys):
        traced.append(1)
        return run(weights, TIED, Sampling(3, 4), batch, stops, keys)

    step, weights = jax.jit(counted), random_decoder()
    samples = [
        step(weights, random_batch(seed), STOPS, keys_of(key, 3)) for seed, key in ((0, 0), (0, 0), (1, 0), (0, 1))
    ]
    assert len(traced) == 1, "new prompts and keys must not compile again"
    assert np.array_equal(samples[0].tokens, samples[1].tokens)
    assert not np.array_equal(samples[0].tokens, samples[2].tokens)
    assert not np.array_equal(samples[0].tokens, samples[3].tokens)


# ---------------------------------------------------------------- truncation and distribution


def naive_set(logits, top_k, top_p):
    """Ids kept, by going through the tokens from the likeliest on."""
    order = np.argsort(-logits)
    kept = order[: top_k or len(order)]
    weight = np.exp(logits[kept].astype(np.float64))
    total, ids = 0.0, []
    for token, share in zip(kept, weight / weight.sum(), strict=True):
        if total >= top_p:
            break
        ids.append(int(token))
        total += share
    return set(ids)


@pytest.mark.parametrize(("top_k", "top_p"), [(1, 1.0), (5, 1.0), (0, 0.01), (0, 0.6), (7, 0.7), (0, 1.0), (99, 1.0)])
def test_truncation_keeps_what_a_naive_one_keeps_and_nothing_else_is_drawn(top_k, top_p):
    logits = np.random.default_rng(1).normal(0, 2, (3, 200, 24)).astype(np.float32)
    sampling = Sampling(200, top_k=top_k, top_p=top_p)
    kept = np.asarray(jax.jit(truncate, static_argnums=1)(logits, sampling))
    tokens = np.asarray(jax.jit(draw, static_argnums=1)(logits, sampling, keys_of(2, 3)))
    for i, j in np.ndindex(3, 200):
        expected = naive_set(logits[i, j], top_k, top_p)
        assert set(np.flatnonzero(np.isfinite(kept[i, j]))) == expected, (i, j)
        assert tokens[i, j] in expected, (i, j)
    assert np.array_equal(kept[np.isfinite(kept)], logits[np.isfinite(kept)]), "kept logits are unchanged"


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.5), Sampling(temperature=2.0, top_k=4)])
def test_draws_follow_the_tempered_distribution(sampling):
    logits = np.array([1.5, 1.0, 0.0, -0.5, 0.7, -1.0], np.float32)
    count = 20_000
    tokens = draw(jnp.broadcast_to(logits, (2, count, 6)), sampling, keys_of(7, 2))
    probability = np.exp(logits.astype(np.float64) / sampling.temperature)
    if sampling.top_k:
        probability[np.argsort(-logits)[sampling.top_k :]] = 0
    probability /= probability.sum()
    for row in np.asarray(tokens):
        seen = np.bincount(row, minlength=6)
        assert not seen[probability == 0].any()
        real = probability > 0
        assert chisquare(seen[real], count * probability[real]).pvalue > 1e-3, seen
    assert not np.array_equal(tokens[0], tokens[1]), "rows with different keys draw differently"


@pytest.mark.parametrize(
    "change",
    [
        {"candidates": 0},
        {"max_tokens": 0},
        {"temperature": -1.0},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
    ],
)
def test_impossible_settings_are_refused(change):
    with pytest.raises(InputError, match=next(iter(change))):
        Sampling(**change)
