"""The decoder against Qwen2 and Llama in torch, and its prefix, branches and cache against one plain sequence.

The library multiplies embeddings by sqrt(D) at its input and keeps table rows that much smaller. A torch table E is
therefore copied as E / sqrt(D). Where the table is tied, the logits would shrink by the same factor; the gain of the
last normalisation, which nothing but the logits reads, is copied times sqrt(D) and makes up for it.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from array_samples import TIED, UNTIED, causal_hidden, copied, random_batch, random_decoder, worst_difference
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from jraggym.errors import InputError
from jraggym.models import attention
from jraggym.models.decoder import (
    Decoder,
    DecoderConfig,
    Layer,
    Spec,
    branch_forward,
    decode_step,
    empty_cache,
    init,
    is_spec,
    prefix_forward,
    specs,
    unembedding,
)
from jraggym.objectives.forward import branches, token_logprobs


@pytest.fixture(scope="module")
def batch():
    return random_batch()


prefill = jax.jit(prefix_forward, static_argnums=1)
branch = jax.jit(branch_forward, static_argnums=1)


@functools.partial(jax.jit, static_argnums=1)
def value_and_grad(weights, config, batch):
    return jax.value_and_grad(lambda w: jnp.sum(token_logprobs(w, config, batch)))(weights)


# ---------------------------------------------------------------- parity with transformers

SIZES: dict[str, Any] = {
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
    tensors = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
    names = {
        **{name: f"self_attn.{name}_proj.weight" for name in "qkvo"},
        **({f"{name}_bias": f"self_attn.{name}_proj.bias" for name in "qkv"} if config.qkv_bias else {}),
        **{name: f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")},
        **{"attention_norm": "input_layernorm.weight", "mlp_norm": "post_attention_layernorm.weight"},
    }

    def stack(name):
        stacked = np.stack([tensors[f"model.layers.{n}.{name}"] for n in range(config.layers)])
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
    shapes = jax.tree.map(np.shape, weights)
    assert shapes == jax.tree.map(lambda s: s.shape, specs(config), is_leaf=is_spec)
    data = random_batch(seed=3, rows=4, candidates=2, prompt=9, action=6, vocab=41)
    prefix = prefill(weights, config, data.prompt, data.prompt_mask)
    tokens, mask = branches(data)
    hidden = np.asarray(branch(weights, config, prefix, tokens, mask))[:, 0]
    logits = hidden @ unembedding(weights)

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


@pytest.fixture(scope="module")
def long_batch():
    return random_batch(rows=2, candidates=2, prompt=2 * attention.BLOCK + 90)


@pytest.mark.parametrize(("config", "name"), [(TIED, "batch"), (UNTIED, "batch"), (TIED, "long_batch")])
def test_prefix_and_branches_equal_one_plain_sequence(config, name, request):
    weights, batch = random_decoder(config), request.getfixturevalue(name)
    prefix = prefill(weights, config, batch.prompt, batch.prompt_mask)
    hidden = np.asarray(branch(weights, config, prefix, *branches(batch)))
    ids, lengths = copied(batch)
    expected = causal_hidden(weights, config, ids)
    for i, j in np.ndindex(hidden.shape[:2]):
        first, count = lengths[i] - 1, 1 + batch.action_mask[i, j].sum()
        assert np.max(np.abs(hidden[i, j, :count] - expected[i, j, first : first + count])) < 1e-5, (i, j)


def test_blocks_have_the_gradient_of_one(long_batch, monkeypatch):
    def gradient():
        return jax.jit(jax.grad(lambda w: jnp.mean(token_logprobs(w, TIED, long_batch))))(random_decoder())

    in_blocks = gradient()
    monkeypatch.setattr(attention, "BLOCKS", 1)
    assert worst_difference(in_blocks, gradient()) < 1e-6


@pytest.mark.parametrize("size", [0, 1, 255, 256, 257, 1023, 2048, 5000])
def test_blocks_of_queries_meet_no_key_behind_their_end(size, monkeypatch):
    met = []
    one = jnp.zeros((1, 1, size, 2))
    keys = attention.Keys(one, one, jnp.ones((1, 1, size, size), bool))
    monkeypatch.setattr(
        attention,
        "attend",
        lambda q, parts, *_: met.append((q.shape[2], parts[0].k.shape[2])) or q.swapaxes(1, 2)[..., 0],
    )
    assert attention.attend_back(one, keys, 1.0).shape == (1, size, 1)
    queries, ends = map(np.array, zip(*met, strict=True))
    assert ends[-1] == size
    assert np.array_equal(np.cumsum(queries), ends)
    assert len(met) == max(1, min(attention.BLOCKS, -(-size // attention.BLOCK)))
    assert np.ptp(queries) <= 1, "the blocks differ"


@pytest.mark.parametrize("config", [TIED, UNTIED])
def test_decode_steps_equal_the_branches(config, batch):
    weights = random_decoder(config)
    tokens, mask = map(np.asarray, branches(batch))
    prefix = prefill(weights, config, batch.prompt, batch.prompt_mask)
    expected = np.asarray(branch(weights, config, prefix, tokens, np.ones_like(mask)))
    cache = empty_cache(config, prefix, tokens.shape[1], tokens.shape[2] + 2)
    cache = jax.tree.map(lambda leaf: jnp.full_like(leaf, 7.0), cache)  # slots to come must stay unseen
    step = jax.jit(decode_step, static_argnums=1)
    for slot in range(tokens.shape[2]):
        hidden, cache = step(weights, config, prefix, cache, np.int32(slot), tokens[:, :, slot])
        assert np.max(np.abs(np.asarray(hidden) - expected[:, :, slot])) < 1e-5, f"slot {slot}"


def test_padding_changes_neither_values_nor_gradients(batch):
    weights = random_decoder()
    value, gradient = value_and_grad(weights, TIED, batch)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient)), "NaN in a gradient"
    assert min(np.abs(leaf).max() for leaf in jax.tree.leaves(gradient)) > 0, "a weight gets no gradient"
    rng = np.random.default_rng(9)
    for garbage in (0, 28, 10_000, -1, None):
        ids = rng.integers(0, 29, (2, *batch.action.shape)) if garbage is None else np.full((2, 1, 1, 1), garbage)
        spoiled = batch.replace(
            prompt=np.where(batch.prompt_mask, batch.prompt, ids[0, :, 0, :1]).astype(np.int32),
            action=np.where(batch.action_mask, batch.action, ids[1]).astype(np.int32),
        )
        other, other_gradient = value_and_grad(weights, TIED, spoiled)
        assert abs(float(value - other)) < 1e-5, garbage
        assert worst_difference(gradient, other_gradient) < 1e-5, garbage


def test_candidates_do_not_see_each_other(batch):
    weights = random_decoder()
    prefix = prefill(weights, TIED, batch.prompt, batch.prompt_mask)
    changed = batch.replace(action=np.concatenate([batch.action[:, :1], (batch.action[:, 1:] + 1) % 29], axis=1))
    before, after = (np.asarray(branch(weights, TIED, prefix, *branches(b))) for b in (batch, changed))
    assert worst_difference(before[:, 0], after[:, 0]) == 0.0
    assert worst_difference(before[:, 1:], after[:, 1:]) > 0.1


@pytest.mark.parametrize("remat", ["dots", "layer"])
def test_remat_gives_the_same_gradient(batch, remat):
    weights = random_decoder()
    plain, other = (value_and_grad(weights, dataclasses.replace(TIED, remat=r), batch) for r in ("none", remat))
    assert worst_difference(plain, other) < 1e-5


@pytest.mark.parametrize("field", ["remat", "attention"])
def test_an_unknown_variant_is_refused(field):
    with pytest.raises(InputError, match=rf"unknown {field}; got fastest. Use one of"):
        DecoderConfig(**{field: "fastest"})


def test_bfloat16_activations_with_float32_weights(batch):
    weights, states = random_decoder(), []
    for dtype in ("bfloat16", "float32"):
        config = dataclasses.replace(TIED, dtype=dtype)
        prefix = prefill(weights, config, batch.prompt, batch.prompt_mask)
        states.append(branch(weights, config, prefix, *branches(batch)))
        assert (prefix.k.dtype, states[-1].dtype) == (dtype, dtype)
        found = jax.eval_shape(functools.partial(token_logprobs, config=config), weights, batch=batch)
        assert found.dtype == np.float32
    mask = np.asarray(branches(batch)[1])
    rough, exact = (np.asarray(x, np.float32)[mask] for x in states)
    assert 0 < np.sqrt(np.mean((rough - exact) ** 2)) < 0.02 * np.std(exact)


# ---------------------------------------------------------------- configuration and weights


@pytest.mark.parametrize(
    ("change", "message"),
    [({"query_heads": 4, "kv_heads": 3}, "multiple of kv_heads"), ({"head_dim": 5}, "head_dim must be even")],
)
def test_impossible_sizes_are_refused_by_name(change, message):
    with pytest.raises(InputError, match=message):
        DecoderConfig(**change)


def test_weights_follow_the_table_the_key_and_their_place():
    table = {
        "a": Spec((50, 40), (None, None), 0.2),
        "b": Spec((50, 40), (None, None), 0.2),
        "gain": Spec((3,), (None,), 0),
    }
    draw = jax.jit(lambda key: init(table, key))
    weights, again, other = (draw(jax.random.key(seed)) for seed in (0, 0, 1))
    assert worst_difference(weights, again) == 0.0
    assert (np.asarray(weights["gain"]) == 1).all()
    assert np.std(weights["a"]) == pytest.approx(0.2, rel=0.05)
    assert np.abs(weights["a"]).max() < 0.6 + 1e-6, "cut at three standard deviations"
    assert worst_difference(weights["a"], weights["b"]) > 0.1
    assert worst_difference(weights["a"], other["a"]) > 0.1


def test_the_table_leaves_out_what_a_config_does_without():
    assert specs(TIED).unembed is None
    assert specs(UNTIED).unembed.shape == (16, 29)
    assert specs(TIED).layers.q_bias.shape == (2, 24)
    assert specs(UNTIED).layers.q_bias is None
