"""The induction head that a from-scratch actor starts with."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jraggym.errors import InputError
from jraggym.models.decoder import DecoderConfig, init, prefix_forward, specs, unembedding
from jraggym.models.decoder import branch_forward as branch
from jraggym.models.induction import with_induction_head

CONFIG = DecoderConfig(vocab=512)


def repeated_minus_fresh(weights):
    """How much likelier a token is, in nats, when the sequence so far tells it: 40 random tokens, twice."""
    once = np.stack([np.random.default_rng(i).permutation(512)[:40] for i in range(8)])
    tokens = np.concatenate([once, once], axis=1).astype(np.int32)
    prefix = prefix_forward(weights, CONFIG, tokens[:, :1], np.ones((8, 1), bool))
    hidden = branch(weights, CONFIG, prefix, tokens[:, None], np.ones((8, 1, 80), bool))[:, 0]
    logprob = jax.nn.log_softmax(hidden @ unembedding(weights))
    found = jnp.take_along_axis(logprob[:, :-1], tokens[:, 1:, None], axis=-1)[..., 0]
    return float(found[:, 40:].mean() - found[:, 1:39].mean())


def test_untrained_weights_with_the_head_predict_what_came_before():
    plain = init(specs(CONFIG), jax.random.key(0))
    assert abs(repeated_minus_fresh(plain)) < 0.2
    assert repeated_minus_fresh(with_induction_head(plain, CONFIG)) > 0.5


@pytest.mark.parametrize("change", [{"layers": 1}, {"qkv_bias": False}, {"kv_heads": 1}])
def test_a_decoder_that_cannot_hold_it_is_refused(change):
    config = dataclasses.replace(CONFIG, **change)
    with pytest.raises(InputError, match="an induction head needs"):
        with_induction_head(init(specs(config), jax.random.key(0)), config)
