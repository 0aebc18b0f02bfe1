"""An induction head to start from: "... A B ... A" -> "B", by which a from-scratch actor copies names that it reads.

Such a head takes two layers (arXiv 2209.11895): the first writes each token's predecessor beside it, the second looks
for the place whose predecessor is the present token, and copies the token there. A small model finds it late.
"""

from __future__ import annotations

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
from jax import Array

from jraggym.errors import InputError
from jraggym.models.decoder import Decoder, DecoderConfig

BACK = 3.5  # biases of the head that looks back
MATCH = 4.0  # weight of a match between a token and a predecessor
WRITE = 2.0  # length at which the predecessor is written
FAST = 2 / 3  # share of the rotary pairs that turn too fast to compare tokens far apart


def with_induction_head(weights: Decoder, config: DecoderConfig) -> Decoder:
    """The weights with head 0 of layers 0 and 1 set to a rough induction head.

    Raises InputError without qkv_bias, with fewer than two layers, or with fewer key/value than query heads.
    """
    if config.layers < 2 or not config.qkv_bias or config.kv_heads != config.query_heads:
        raise InputError(
            "an induction head needs two layers, qkv_bias and as many key/value as query heads",
            got=config,
            remedy="Change the configuration.",
        )
    d, h, layers = config.model, config.head_dim, weights.layers
    pairs = np.arange(int(FAST * (h // 2)), h // 2)
    slow = np.concatenate([pairs, pairs + h // 2])
    rng = np.random.default_rng(0)
    read = np.zeros((d, h), np.float32)  # a random view of a token ...
    read[:, slow] = rng.normal(size=(d, len(slow))) * d**-0.5
    beside = np.zeros((d, h), np.float32)  # ... and the directions in which the next position keeps it
    beside[:, slow] = np.linalg.qr(rng.normal(size=(d, len(slow))))[0]
    copy = np.linalg.qr(rng.normal(size=(d, h)))[0]
    q_bias, k_bias = _look_back(config)
    return replace(
        weights,
        layers=replace(
            layers,
            q_bias=layers.q_bias.at[0, :h].set(q_bias),
            k_bias=layers.k_bias.at[0, :h].set(k_bias),
            v=layers.v.at[0, :, :h].set(read).at[1, :, :h].set(copy),
            o=layers.o.at[0, :h].set(WRITE * beside.T).at[1, :h].set(copy.T),
            q=layers.q.at[1, :, :h].set(MATCH**0.5 * read),
            k=layers.k.at[1, :, :h].set(MATCH**0.5 * beside),
        ),
    )


def _look_back(config: DecoderConfig) -> tuple[Array, Array]:
    """Biases of queries and keys that meet at the previous token.

    With k = a and q = a turned by -1 position, the score at distance d is a^2 sum_f cos(f (d - 1)).
    """
    half = config.head_dim // 2
    frequency = config.rope_theta ** -(np.arange(0, config.head_dim, 2) / config.head_dim)
    q = BACK * np.concatenate([np.cos(frequency), -np.sin(frequency)])
    return jnp.asarray(q, jnp.float32), jnp.asarray(BACK * np.repeat([1.0, 0.0], half), jnp.float32)
