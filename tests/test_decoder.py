"""The decoder against Qwen2 and Llama in torch, and its prefix, branches and cache against one plain sequence.

The library multiplies embeddings by sqrt(D) at its input and keeps table rows that much smaller. A torch table E is
therefore copied as E / sqrt(D). Where the table is tied, the logits would shrink by the same factor; the gain of the
last normalisation, which nothing but the logits reads, is copied times sqrt(D) and makes up for it.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from array_samples import TIED, UNTIED, causal_hidden, random_batch, random_decoder, worst_difference
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from jraggym.errors import InputError
from jraggym.models.attention import rotary, turn
from jraggym.models.decoder import (
    Decoder,
    DecoderConfig,
    Layer,
    branch_forward,
    decode_step,
    empty_cache,
    init,
    look_back,
    prefix_forward,
    specs,
    unembedding,
)
from jraggym.objectives.forward import branches, token_logprobs


@pytest.fixture(scope="module")
def batch():
    return random_batch()


def hidden_states(weights, config, batch):
    prefix = prefix_forward(weights, config, batch.prompt, batch.prompt_mask)
    return branch_forward(weights, config, prefix, *branches(batch))


# ---------------------------------------------------------------- parity with transformers

SIZES = {
    "vocab_size": 41,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "rms_norm_eps": 1e-5,
    "attn_implementation": "eager",
}
ROPE = {"rope_type": "default", "rope_theta": 500.0}


def qwen():
    torch.manual_seed(0)
    torch_config = Qwen2Config(**SIZES, num_key_value_heads=2, tie_word_embeddings=True, rope_parameters=ROPE)
    config = DecoderConfig(
        vocab=41, model=24, layers=3, query_heads=4, kv_heads=2, head_dim=6, feed_forward=40, rope_theta=500.0,
        norm_eps=1e-5, tied=True, qkv_bias=True,
    )  # fmt: skip
    return Qwen2ForCausalLM(torch_config), config


def llama():
    torch.manual_seed(1)
    torch_config = LlamaConfig(
        **SIZES, num_key_value_heads=1, head_dim=8, tie_word_embeddings=False, rope_parameters=ROPE
    )
    config = DecoderConfig(
        vocab=41, model=24, layers=3, query_heads=4, kv_heads=1, head_dim=8, feed_forward=40, rope_theta=500.0,
        norm_eps=1e-5, tied=False, qkv_bias=False,
    )  # fmt: skip
    return LlamaForCausalLM(torch_config), config


def from_torch(model, config) -> Decoder:
    tensors = {name: jnp.asarray(tensor.detach().numpy()) for name, tensor in model.state_dict().items()}
    names = {
        **{name: f"self_attn.{name}_proj.weight" for name in "qkvo"},
        **({f"{name}_bias": f"self_attn.{name}_proj.bias" for name in "qkv"} if config.qkv_bias else {}),
        **{name: f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")},
        **{"attention_norm": "input_layernorm.weight", "mlp_norm": "post_attention_layernorm.weight"},
    }

    def stack(name):
        stacked = jnp.stack([tensors[f"model.layers.{n}.{name}"] for n in range(config.layers)])
        return stacked.swapaxes(1, 2) if stacked.ndim == 3 else stacked  # torch holds [out, in]

    scale = config.model**0.5
    return Decoder(
        embed=tensors["model.embed_tokens.weight"] / scale,
        layers=Layer(**dict.fromkeys(("q_bias", "k_bias", "v_bias")) | {f: stack(name) for f, name in names.items()}),
        final_norm=tensors["model.norm.weight"] * (scale if config.tied else 1.0),
        unembed=None if config.tied else tensors["lm_head.weight"].T,
    )


@pytest.mark.parametrize("build", [qwen, llama])
def test_left_padded_prompts_match_transformers_layer_by_layer_and_end_to_end(build):
    model, config = build()
    with torch.no_grad():  # random gains and biases: transformers starts them at one and zero
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    weights = from_torch(model, config)
    shapes = jax.tree.map(jnp.shape, weights)
    assert shapes == jax.tree.map(lambda s: s.shape, specs(config), is_leaf=lambda s: hasattr(s, "scale"))
    data = random_batch(seed=3, rows=3, candidates=1, prompt=9, action=6, vocab=41)
    prefix = jax.jit(prefix_forward, static_argnums=1)(weights, config, data.prompt, data.prompt_mask)
    tokens, mask = branches(data)
    hidden = jax.jit(branch_forward, static_argnums=1)(weights, config, prefix, tokens, mask)
    logits = np.asarray(hidden[:, 0] @ unembedding(weights))

    ids = np.concatenate([data.prompt, data.action[:, 0]], axis=1)
    real = np.concatenate([data.prompt_mask, data.action_mask[:, 0]], axis=1)
    position = np.maximum(np.cumsum(real, axis=1) - 1, 0)
    with torch.no_grad():
        wanted = model(
            input_ids=torch.tensor(ids),
            attention_mask=torch.tensor(real).long(),
            position_ids=torch.tensor(position),
            use_cache=True,
        )
    p = data.prompt.shape[1]
    where = data.prompt_mask[:, : p - 1]
    for n, layer in enumerate(wanted.past_key_values.layers):
        for ours, theirs in ((prefix.k[n], layer.keys), (prefix.v[n], layer.values)):
            theirs = theirs[:, :, : p - 1].numpy().swapaxes(1, 2)[where]
            assert np.max(np.abs(np.asarray(ours).swapaxes(1, 2)[where] - theirs)) < 1e-4, f"layer {n}"
    theirs = wanted.logits[:, p - 1 :].numpy()[np.asarray(mask[:, 0])]
    assert np.std(theirs) > 0.5, "the comparison is empty: all logits alike"
    assert np.max(np.abs(logits[np.asarray(mask[:, 0])] - theirs)) < 1e-4


# ---------------------------------------------------------------- prefix, branches, cache


@pytest.mark.parametrize("config", [TIED, UNTIED])
def test_prefix_and_branches_equal_one_plain_sequence(config, batch):
    weights = random_decoder(config)
    hidden = np.asarray(jax.jit(hidden_states, static_argnums=1)(weights, config, batch))
    plain = jax.jit(causal_hidden, static_argnums=1)
    b, k, p, a = batch.shape
    for i, j in np.ndindex(b, k):
        real = np.concatenate([batch.prompt[i][batch.prompt_mask[i]], batch.action[i, j][batch.action_mask[i, j]]])
        expected = plain(weights, config, np.pad(real, (0, p + a - len(real))))
        first = batch.prompt_mask[i].sum() - 1
        count = len(real) - first
        assert np.max(np.abs(hidden[i, j, :count] - expected[first : first + count])) < 1e-5, (i, j)


@pytest.mark.parametrize("config", [TIED, UNTIED])
def test_decode_steps_equal_the_branches(config, batch):
    weights = random_decoder(config)
    tokens, mask = branches(batch)
    prefix = prefix_forward(weights, config, batch.prompt, batch.prompt_mask)
    expected = np.asarray(branch_forward(weights, config, prefix, tokens, jnp.ones_like(mask)))
    cache = empty_cache(config, prefix, tokens.shape[1], tokens.shape[2] + 2)  # spare slots must stay unseen
    cache = jax.tree.map(lambda leaf: leaf + 7.0, cache)
    step = jax.jit(decode_step, static_argnums=1)
    for slot in range(tokens.shape[2]):
        hidden, cache = step(weights, config, prefix, cache, jnp.int32(slot), tokens[:, :, slot])
        assert np.max(np.abs(np.asarray(hidden) - expected[:, :, slot])) < 1e-5, f"slot {slot}"
    assert step._cache_size() == 1


@pytest.mark.parametrize("remat", [False, True])
def test_padding_changes_neither_values_nor_gradients(remat, batch):
    config = dataclasses.replace(TIED, remat=remat)
    weights = random_decoder(config)

    @jax.jit
    def value_and_grad(data):
        return jax.value_and_grad(lambda w: jnp.sum(token_logprobs(w, config, data)))(weights)

    value, gradient = value_and_grad(batch)
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(gradient)), "NaN in a gradient"
    assert min(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(gradient)) > 0, "a weight gets no gradient"
    rng = np.random.default_rng(9)
    for garbage in (0, 28, 10_000, -1, None):
        ids = rng.integers(0, 29, (2, *batch.action.shape)) if garbage is None else np.full((2, 1, 1, 1), garbage)
        spoiled = batch.replace(
            prompt=np.where(batch.prompt_mask, batch.prompt, ids[0, :, 0, :1]).astype(np.int32),
            action=np.where(batch.action_mask, batch.action, ids[1]).astype(np.int32),
        )
        other, other_gradient = value_and_grad(spoiled)
        assert abs(float(value - other)) < 1e-5, garbage
        assert worst_difference(gradient, other_gradient) < 1e-5, garbage


def test_a_longer_padding_changes_nothing(batch):
    weights = random_decoder()
    wider = batch.replace(
        prompt=np.pad(batch.prompt, ((0, 0), (5, 0)), constant_values=3),
        prompt_mask=np.pad(batch.prompt_mask, ((0, 0), (5, 0))),
    )
    assert worst_difference(token_logprobs(weights, TIED, batch), token_logprobs(weights, TIED, wider)) < 1e-5


def test_candidates_do_not_see_each_other(batch):
    weights = random_decoder()
    changed = batch.replace(action=np.concatenate([batch.action[:, :1], (batch.action[:, 1:] + 1) % 29], axis=1))
    before, after = token_logprobs(weights, TIED, batch), token_logprobs(weights, TIED, changed)
    assert worst_difference(before[:, 0], after[:, 0]) == 0.0
    assert worst_difference(before[:, 1:], after[:, 1:]) > 0.1


def test_remat_gives_the_same_gradient(batch):
    weights = random_decoder()

    def gradient(config):
        return jax.jit(jax.grad(lambda w: jnp.sum(hidden_states(w, config, batch)[..., 0] ** 2)))(weights)

    assert worst_difference(gradient(TIED), gradient(dataclasses.replace(TIED, remat=True))) < 1e-5


def test_bfloat16_activations_with_float32_weights(batch):
    weights = random_decoder()
    half = dataclasses.replace(TIED, dtype="bfloat16")
    prefix = prefix_forward(weights, half, batch.prompt, batch.prompt_mask)
    hidden = branch_forward(weights, half, prefix, *branches(batch))
    assert (prefix.k.dtype, hidden.dtype) == (jnp.bfloat16, jnp.bfloat16)
    found, exact = token_logprobs(weights, half, batch), token_logprobs(weights, TIED, batch)
    assert found.dtype == jnp.float32
    assert 0 < worst_difference(found, exact) < 0.1


def test_look_back_makes_one_head_read_the_previous_token():
    config = dataclasses.replace(TIED, head_dim=16)
    weights = look_back(random_decoder(config), config)
    h = config.head_dim
    angles = rotary(jnp.arange(12)[None], h, config.rope_theta)
    q, k = (
        turn(jnp.broadcast_to(bias[0, :h], (1, 1, 12, h)), angles)[0, 0]
        for bias in (weights.layers.q_bias, weights.layers.k_bias)
    )
    scores = np.where(np.tri(12), np.asarray(q @ k.T), -np.inf)
    assert list(scores.argmax(axis=1)[1:]) == list(range(11))
    np.testing.assert_allclose(scores[1:].max(axis=1), 2.5**2 * h / 2, rtol=1e-5)


# ---------------------------------------------------------------- configuration and weights


@pytest.mark.parametrize(
    ("change", "message"),
    [({"query_heads": 4, "kv_heads": 3}, "multiple of kv_heads"), ({"head_dim": 5}, "head_dim must be even")],
)
def test_impossible_sizes_are_refused_by_name(change, message):
    with pytest.raises(InputError, match=message):
        DecoderConfig(**change)


@pytest.mark.parametrize("config", [DecoderConfig(), UNTIED])
def test_weights_follow_the_table_and_the_key(config):
    weights, again = (init(specs(config), jax.random.key(0)) for _ in range(2))
    other = init(specs(config), jax.random.key(1))
    assert worst_difference(weights, again) == 0.0
    assert (weights.unembed is None) == config.tied
    assert (weights.layers.q_bias is None) != config.qkv_bias
    assert bool(jnp.all(weights.final_norm == 1))
    assert worst_difference(weights.layers.q, other.layers.q) > 0.1
    assert abs(float(jnp.std(weights.embed)) * config.model**0.5 - 1) < 0.15
