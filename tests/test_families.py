"""Every family against transformers: each layer, logits, branches, cache, generation, likelihoods, gradients, meshes;
and config.json in and out."""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from array_samples import random_batch, random_decoder, worst_difference
from hf_samples import FAMILIES, SIZES, from_state, hf_config, sample_model, to_state, until_layer
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from jraggym.errors import InputError
from jraggym.models.attention import soft_cap
from jraggym.models.decoder import (
    DecoderConfig,
    RopeScaling,
    branch_forward,
    decode_step,
    empty_cache,
    init,
    prefix_forward,
    specs,
    unembedding,
)
from jraggym.models.families import CAPS, REQUIRED, decoder_config, family_config
from jraggym.models.packed import packed_forward
from jraggym.models.tensor_names import portable
from jraggym.objectives.forward import branches, token_logprobs_and_entropy
from jraggym.sampling import Sampling, sample
from jraggym.sharding import batch_sharding, make_mesh, place, shardings

CLOSE = 1e-4
NAMES = list(FAMILIES)


@pytest.fixture(params=NAMES)
def case(request):
    return sample_model(request.param)


@pytest.fixture(scope="module")
def batch():
    """Left-padded prompts, longer than the windows, with two right-padded candidates each."""
    return random_batch(seed=1, rows=4, candidates=2, prompt=12, action=7, vocab=64)


@functools.partial(jax.jit, static_argnums=1)
def forward(weights, config, prompt, prompt_mask, tokens, mask):
    """Hidden states [B, K, A, D] of the branches, and their logits."""
    prefix = prefix_forward(weights, config, prompt, prompt_mask)
    hidden = branch_forward(weights, config, prefix, tokens, mask)
    return hidden, soft_cap(hidden @ unembedding(weights), config.final_cap)


def theirs(model, ids, real):
    """Hidden states after the embedding and every layer, all behind the last norm, and logits, by transformers."""
    position = np.maximum(np.cumsum(real, axis=1) - 1, 0)
    with torch.no_grad():
        found = model(
            input_ids=torch.tensor(ids),
            attention_mask=torch.tensor(real).long(),
            position_ids=torch.tensor(position),
            output_hidden_states=True,
        )
        hidden = [model.model.norm(h).numpy() for h in found.hidden_states[:-1]]
    return [*hidden, found.hidden_states[-1].numpy()], found.logits.numpy()


def written_out(batch):
    """Ids and mask [B * K, P + A] of every candidate behind its own copy of the prompt."""
    parts = [(batch.prompt, batch.action), (batch.prompt_mask, batch.action_mask)]
    k = batch.action.shape[1]
    return [np.concatenate([np.repeat(p[:, None], k, 1), a], axis=2).reshape(len(p) * k, -1) for p, a in parts]


# ---------------------------------------------------------------- the same numbers as transformers


def assert_every_layer(model, config, weights, ids, real, begin, inputs):
    """Our hidden states and logits of the tokens from `begin` on against those of the whole sequences."""
    hidden, logits = theirs(model, ids, real)
    where = real[:, begin:]
    assert np.std(logits[:, begin:][where]) > 0.3, "the comparison is empty: all logits alike"
    for n, expected in enumerate(hidden):
        found, ours = forward(until_layer(weights, n), config, *inputs)
        found = np.asarray(found).reshape(*where.shape, -1)
        assert worst_difference(found[where], expected[:, begin:][where]) < CLOSE, f"layer {n}"
    ours = np.asarray(ours).reshape(*where.shape, -1)
    assert worst_difference(ours[where], logits[:, begin:][where]) < CLOSE


def test_left_padded_prompts_with_branches_layer_by_layer(case, batch):
    ids, real = written_out(batch)
    inputs = batch.prompt, batch.prompt_mask, *branches(batch)
    assert_every_layer(*case, ids, real, batch.prompt.shape[1] - 1, inputs)


def test_right_padded_sequences_layer_by_layer(case):
    rng = np.random.default_rng(2)
    ids = rng.integers(3, 64, (3, 17), dtype=np.int32)
    real = np.arange(17) < np.array([[17], [9], [3]])
    inputs = ids[:, :1], real[:, :1], ids[:, None], real[:, None]
    assert_every_layer(*case, ids, real, 0, inputs)


def test_decode_steps_equal_the_whole_sequences(case, batch):
    model, config, weights = case
    tokens = np.asarray(branches(batch)[0])
    ids, real = written_out(batch.replace(action_mask=np.ones_like(batch.action_mask)))
    first = batch.prompt.shape[1] - 1
    expected = theirs(model, ids, real)[0][-1][:, first:].reshape(*tokens.shape, -1)
    prefix = jax.jit(prefix_forward, static_argnums=1)(weights, config, batch.prompt, batch.prompt_mask)
    cache = empty_cache(config, prefix, tokens.shape[1], tokens.shape[2] + 1)
    cache = jax.tree.map(lambda leaf: jnp.full_like(leaf, 7.0), cache)  # slots to come must stay unseen
    step = jax.jit(decode_step, static_argnums=1)
    for slot in range(tokens.shape[2]):
        hidden, cache = step(weights, config, prefix, cache, np.int32(slot), tokens[:, :, slot])
        assert worst_difference(hidden, expected[:, :, slot]) < CLOSE, f"slot {slot}"


def test_greedy_generation_is_that_of_transformers(case, batch):
    model, config, weights = case
    with torch.no_grad():
        expected = model.generate(
            input_ids=torch.tensor(batch.prompt).long(),
            attention_mask=torch.tensor(batch.prompt_mask).long(),
            generation_config=type(model.generation_config)(
                max_new_tokens=64,
                do_sample=False,
                pad_token_id=0,
                eos_token_id=64,  # which no model can say
            ),
        )[:, batch.prompt.shape[1] :].numpy()

    @jax.jit
    def greedy(weights):
        prefix = prefix_forward(weights, config, batch.prompt, batch.prompt_mask)
        keys = jax.random.split(jax.random.key(0), len(batch.prompt))
        sampling = Sampling(candidates=2, max_tokens=64, temperature=0.0)
        return sample(weights, config, sampling, prefix, batch.prompt[:, -1], jnp.array([-1]), keys)

    found = np.asarray(greedy(weights).tokens)
    assert len(np.unique(expected)) > 3, "the comparison is empty: always the same token"
    assert found[:, 0].tolist() == expected.tolist()
    assert found[:, 1].tolist() == expected.tolist()


@functools.partial(jax.jit, static_argnums=1)
def value_and_grad(weights, config, batch):
    """((mean log-probability, (log-probabilities, entropies)), gradient of the mean)."""

    def mean(weights):
        found = token_logprobs_and_entropy(weights, config, batch)
        return jnp.mean(found[0]), found

    return jax.value_and_grad(mean, has_aux=True)(weights)


def test_likelihoods_entropies_and_gradients(case, batch):
    model, config, weights = case
    ids, real = written_out(batch)
    logits = theirs(model, ids, real)[1][:, batch.prompt.shape[1] - 1 : -1].astype(np.float64)
    all_logprobs = torch.log_softmax(torch.tensor(logits), dim=-1).numpy().reshape(*batch.action.shape, -1)
    expected = np.take_along_axis(all_logprobs, batch.action[..., None], axis=-1)[..., 0]
    entropy = -np.sum(np.exp(all_logprobs) * all_logprobs, axis=-1)
    (value, found), gradient = value_and_grad(weights, config, batch)
    where = batch.loss_mask & batch.action_mask
    assert worst_difference(np.asarray(found[0])[where], expected[where]) < CLOSE
    assert worst_difference(np.asarray(found[1])[where], entropy[where]) < CLOSE

    assert float(value) == pytest.approx(np.sum(expected[where]) / where.size, abs=CLOSE)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert min(np.abs(leaf).max() for leaf in jax.tree.leaves(gradient)) > 0, "a weight gets no gradient"
    model.zero_grad()
    chosen = torch.log_softmax(model(input_ids=torch.tensor(ids).long(), **padded(real)).logits, dim=-1)
    first = batch.prompt.shape[1]
    chosen = torch.gather(chosen[:, first - 1 : -1], 2, torch.tensor(ids[:, first:]).long()[..., None])[..., 0]
    (chosen * torch.tensor(where.reshape(len(ids), -1))).mean().backward()
    wanted = from_state({name: p.grad.numpy() for name, p in model.named_parameters()}, config)
    assert worst_difference(*in_units_of(wanted, gradient, wanted)) < CLOSE


def in_units_of(tree, *trees):
    """Trees whose leaves are divided by the largest entry of each leaf of `tree`: a gradient's size is no matter."""
    unit = jax.tree.map(lambda leaf: 1.0 + np.abs(leaf).max(), tree)
    return [jax.tree.map(np.divide, other, unit) for other in trees]


def padded(real):
    position = np.maximum(np.cumsum(real, axis=1) - 1, 0)
    return {"attention_mask": torch.tensor(real).long(), "position_ids": torch.tensor(position)}


def test_eight_devices_that_recompute_layers_give_the_same(case, batch):
    _, config, weights = case
    mesh = make_mesh(2, 2, 1 if config.kv_heads == 1 else 2)
    placed = place(weights, shardings(specs(config), mesh)), place(batch, batch_sharding(mesh))
    (_, found), gradient = value_and_grad(placed[0], dataclasses.replace(config, remat="layer"), placed[1])
    (_, wanted), expected = value_and_grad(weights, config, batch)
    assert worst_difference(found, wanted) < 1e-5
    assert worst_difference(*in_units_of(expected, gradient, expected)) < 1e-5


# ---------------------------------------------------------------- fused kernels


@pytest.mark.parametrize(("name", "attention"), [("gemma2", "splash"), ("gemma3", "cudnn"), ("mistral", "splash")])
def test_the_packed_layout_has_windows_and_caps(name, attention, batch):
    _, config, weights = sample_model(name)
    inputs = batch.prompt, batch.prompt_mask, *branches(batch)
    mask = np.asarray(inputs[-1])
    packed = dataclasses.replace(config, attention=attention)
    hidden = jax.jit(packed_forward, static_argnums=1)(weights, packed, *inputs)
    assert worst_difference(np.asarray(hidden)[mask], np.asarray(forward(weights, config, *inputs)[0])[mask]) < CLOSE
    if name == "gemma3":  # whose switch between two kernels is differentiated
        (_, found), gradient = value_and_grad(weights, packed, batch)
        (_, wanted), expected = value_and_grad(weights, config, batch)
        assert worst_difference(found, wanted) < 1e-5
        assert worst_difference(*in_units_of(expected, gradient, expected)) < 1e-5


def test_cudnn_refuses_a_score_cap(batch):
    _, config, weights = sample_model("gemma2")
    config = dataclasses.replace(config, attention="cudnn")
    with pytest.raises(InputError, match=r"cudnn attention has no score_cap; got 1\.5"):
        packed_forward(weights, config, batch.prompt, batch.prompt_mask, *branches(batch))


# ---------------------------------------------------------------- config.json


@pytest.mark.parametrize("name", NAMES)
def test_configuration_and_weights_go_back_to_transformers(name, tmp_path):
    model, config, weights = sample_model(name)
    (tmp_path / "config.json").write_text(json.dumps(family_config(config, **{k: SIZES[k] for k in TOKENS})))
    read = AutoConfig.from_pretrained(tmp_path)
    assert decoder_config(read.to_dict()) == config
    again = AutoModelForCausalLM.from_config(read, attn_implementation="eager")
    state = to_state(weights, config)
    assert {k: v.shape for k, v in state.items()} == {k: tuple(v.shape) for k, v in model.state_dict().items()}
    assert all((state[k] == v.numpy()).all() for k, v in model.state_dict().items())
    again.load_state_dict({k: torch.tensor(v) for k, v in state.items()})
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        assert (again(ids).logits == model(ids).logits).all()
    assert DecoderConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config
    assert hash(config) == hash(dataclasses.replace(config))


TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings")


@pytest.mark.parametrize("scaled", [True, False])
def test_the_tiny_configuration_leaves_as_an_untied_llama(scaled):
    config = DecoderConfig(vocab=64, model=36, scale_embed=scaled)  # 3 heads of 48: not the width
    weights = random_decoder(config)
    plain, moved = portable(config, weights)
    values = family_config(plain)
    family = "llama" if scaled else "qwen2"
    assert (values["model_type"], plain.tied, moved.unembed is None) == (family, not scaled, not scaled)
    hf = AutoConfig.for_model(values.pop("model_type"), **values)
    model = AutoModelForCausalLM.from_config(hf, attn_implementation="eager").eval()
    model.load_state_dict({k: torch.tensor(v) for k, v in to_state(moved, plain).items()})
    ids = np.random.default_rng(0).integers(0, 64, (2, 9), dtype=np.int32)
    real = np.ones_like(ids, bool)
    found = forward(weights, config, ids[:, :1], real[:, :1], ids[:, None], real[:, None])[1][:, 0]
    with torch.no_grad():
        assert worst_difference(found, model(torch.tensor(ids).long()).logits.numpy()) < CLOSE


OLD = {  # what published files say, in the spelling of transformers 4
    "llama3": (
        {
            "rope_theta": 100.0,
            "rope_scaling": {
                "factor": 4.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "rope_type": "llama3",
                "original_max_position_embeddings": 64,
            },
            "torch_dtype": "bfloat16", "pretraining_tp": 1, "mlp_bias": False,
        },
        (),
    ),
    "mistral": ({"rope_theta": 500.0, "torch_dtype": "bfloat16", "transformers_version": "4.34.0.dev0"}, ()),
    "qwen2": ({"rope_theta": 500.0, "use_mrope": False}, ("layer_types",)),
    "gemma2": ({"rope_theta": 500.0, "hidden_act": "gelu_pytorch_tanh", "cache_implementation": "hybrid"},
               ("layer_types",)),
    "gemma3": (
        {
            "rope_theta": 2000.0, "rope_local_base_freq": 100.0, "sliding_window_pattern": 6,
            "rope_scaling": {"factor": 4.0, "rope_type": "linear"},
        },
        ("layer_types", "_sliding_window_pattern"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OLD)
def test_both_spellings_say_the_same(name):
    new, (more, without) = hf_config(name).to_dict(), OLD[name]
    old = {key: value for key, value in new.items() if key not in ("rope_parameters", *without)} | more
    assert decoder_config(old) == decoder_config(new)
    assert decoder_config(json.loads(json.dumps(old))) == decoder_config(new)


def test_what_the_samples_say_is_read():
    gemma = decoder_config(hf_config("gemma3").to_dict())
    assert gemma.local == (True,) * 5 + (False, True)
    assert gemma.rope_scaling == RopeScaling("linear", factor=4.0)
    assert (gemma.rope_theta, gemma.local_rope_theta, gemma.query_scalar) == (2000.0, 100.0, 20.0)
    gemma = decoder_config(hf_config("gemma2").to_dict())
    assert (gemma.local, gemma.score_cap, gemma.final_cap) == ((True, False) * 2, 1.5, 2.5)
    assert decoder_config(hf_config("qwen2-late").to_dict()).local == (False, True, True)
    mistral = decoder_config(hf_config("mistral").to_dict())
    assert (mistral.window, mistral.local, mistral.head_dim) == (5, None, 12)
    assert decoder_config(hf_config("llama3").to_dict()).rope_scaling == RopeScaling("llama3", 4.0, 1.0, 4.0, 64)


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "qwen3"])
def test_gains_begin_at_one(name):
    config = sample_model(name)[1]
    weights = init(specs(config), jax.random.key(0))
    assert np.unique(weights.final_norm) == (0.0 if config.gain_offset else 1.0)
    assert jax.tree.map(np.shape, weights) == jax.tree.map(np.shape, sample_model(name)[2])


YARN = {"rope_type": "yarn", "factor": 4.0}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("llama", {"model_type": "mixtral"}, "unknown model_type; got mixtral. Use one of llama, mistral, qwen2"),
        ("llama", {"model_type": None}, "unknown model_type; got None"),
        ("llama", {"architectures": ["LlamaForTokenClassification"]}, "architectures is not supported; got LlamaForTo"),
        ("llama", {"mlp_bias": True}, "mlp_bias is not supported; got True"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act is not supported; got 'gelu'.*= 'silu' only"),
        ("llama", {"attention_dropout": 0.1}, "attention_dropout is not supported; got 0.1"),
        ("llama", {"sliding_window": 9}, "sliding_window is not supported; got 9.*is it a mistral"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config is not supported; got {'bits': 4}"),
        ("llama", {"auto_map": {"AutoModel": "x.Y"}}, "auto_map is not supported"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is not supported; got 0.5"),
        ("llama", {"rope_parameters": {"rope_theta": 9.0, "partial_rotary_factor": 0.5}},
         "partial_rotary_factor is not supported"),
        ("llama", {"rope_scaling": YARN}, "rope_type is not supported; got yarn. Use one of default, linear, llama3"),
        ("llama", {"rope_parameters": {"type": "dynamic", "factor": 2.0}}, "rope_type is not supported; got dynamic"),
        ("llama", {"rope_scaling": {"type": "linear"}}, "linear rotation lacks a key; got no factor"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0, "beta": 1}}, "unknown keys; got beta"),
        ("llama", {"residual_multiplier": 0.2}, r"unknown settings; got residual_multiplier = 0\.2"),
        ("llama", {"max_window_layers": 3}, "unknown settings; got max_window_layers = 3"),
        ("llama", {"hidden_size": None}, "lacks a size; got no hidden_size"),
        ("llama", {"num_attention_heads": "4"}, "num_attention_heads must be an integer from 1 to 2147483647; got '4'"),
        ("llama", {"head_dim": 7}, "head_dim must be even and positive; got 7"),
        ("mistral", {"layer_types": ["full_attention"] * 3}, "layer_types is not supported; got full_attention"),
        ("qwen2", {"layer_types": ["chunked_attention"] * 3}, "layer_types is not supported; got chunked_attention"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 3}, "layer_types without a sliding_window"),
        ("qwen2", {"layer_types": ["full_attention"]}, "Name sliding_attention or full_attention for each of the 3"),
        ("qwen3", {"attention_bias": True}, "attention_bias is not supported"),
        ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation is not supported; got 'gelu'"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention is not supported; got True"),
        ("gemma3", {"model_type": "gemma3"}, "unknown model_type; got gemma3"),
        ("gemma3", {"rope_parameters": {"rope_theta": 5.0}}, "rope_parameters; got rope_theta"),
        ("gemma3", {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
         "scaling of local layers; got linear"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_refused_by_name(name, change, message):
    with pytest.raises(InputError, match=message):
        decoder_config({**hf_config(name).to_dict(), **change})


def test_a_missing_size_is_named():
    values = hf_config("mistral").to_dict()
    del values["num_key_value_heads"]
    with pytest.raises(InputError, match=r"lacks a size; got no num_key_value_heads"):
        decoder_config(values)
    values = hf_config("llama").to_dict()
    del values["num_key_value_heads"]
    assert decoder_config(values).kv_heads == 4


NAN, HUGE = float("nan"), 10**400
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
NO_NUMBER, NO_FLAG, NO_LIST = "must be a positive number", "must be true or false", "must be a list of names"
NO_INTEGER, NO_OBJECT = "must be an integer from 1 to", "must be an object"


@pytest.mark.parametrize(
    ("name", "key", "value", "message"),
    [
        ("llama", "model_type", [], "unknown model_type; got []"),
        ("llama", "model_type", {}, "unknown model_type; got {}"),
        ("llama", "architectures", 3, f"{NO_LIST}; got 3"),
        ("llama", "architectures", [[]], f"{NO_LIST}; got [[]]"),
        ("llama", "architectures", "LlamaForCausalLM", f"{NO_LIST}; got 'LlamaForCausalLM'"),
        *[("llama", "rms_norm_eps", value, f"{NO_NUMBER}; got {value!r}") for value in ("x", NAN, -1e-5, 0, True, [])],
        *[("llama", "rope_theta", value, f"{NO_NUMBER}; got {value!r}") for value in ("x", -1, NAN, HUGE, {})],
        ("gemma3", "rope_local_base_freq", "x", f"{NO_NUMBER}; got 'x'"),
        *[("llama", "rope_scaling", value, f"{NO_OBJECT}; got {value!r}") for value in ("x", 3, [], False)],
        ("llama", "rope_parameters", ["x"], f"{NO_OBJECT}; got ['x']"),
        ("gemma3", "rope_parameters", {"full_attention": 3}, f"rope_parameters: full_attention {NO_OBJECT}; got 3"),
        ("llama", "rope_scaling", {"type": "linear", "factor": "8"}, f"rope_scaling: factor {NO_NUMBER}; got '8'"),
        ("llama", "rope_scaling", {"type": "linear", "factor": NAN}, f"rope_scaling: factor {NO_NUMBER}; got nan"),
        ("llama", "rope_scaling", {"type": "linear", "factor": 2.0}, "two rotations that differ; got rope_scaling"),
        ("llama", "rope_scaling", {"rope_type": []}, "rope_scaling: rope_type is not supported; got []"),
        ("llama", "rope_scaling", {"rope_theta": "x"}, f"rope_scaling: rope_theta {NO_NUMBER}; got 'x'"),
        ("llama", "rope_scaling", {**LLAMA3, "original_max_position_embeddings": None},
         "llama3 rotation lacks a key; got no original_max_position_embeddings"),
        ("llama", "rope_scaling", {**LLAMA3, "original_max_position_embeddings": 64.5},
         f"original_max_position_embeddings {NO_INTEGER} 2147483647; got 64.5"),
        ("qwen2", "layer_types", 3, f"{NO_LIST}; got 3"),
        ("qwen2", "layer_types", [[]] * 3, f"{NO_LIST}; got [[], [], []]"),
        *[("mistral", "sliding_window", value, f"{NO_INTEGER} 2147483647; got {value!r}")
          for value in ("x", 3.5, 0, True)],
        ("qwen2", "use_sliding_window", "no", f"{NO_FLAG}; got 'no'"),
        ("qwen2", "max_window_layers", "x", "must be an integer from 0 to 2147483647; got 'x'"),
        ("gemma3", "sliding_window_pattern", "x", f"{NO_INTEGER} 2147483647; got 'x'"),
        ("gemma2", "query_pre_attn_scalar", "x", f"{NO_NUMBER}; got 'x'"),
        *[("gemma2", key, "x", f"{NO_NUMBER}; got 'x'") for key in CAPS],
        ("llama", "tie_word_embeddings", "no", f"{NO_FLAG}; got 'no'"),
        ("llama", "attention_bias", "no", f"{NO_FLAG}; got 'no'"),
        ("llama", "vocab_size", HUGE, f"{NO_INTEGER} 2147483647; got 1000"),
        ("llama", "num_hidden_layers", 2**31 - 1, f"{NO_INTEGER} 9999; got 2147483647"),
        ("llama", "head_dim", True, f"{NO_INTEGER} 2147483647; got True"),
    ],
)  # fmt: skip
def test_a_value_of_another_kind_is_refused_by_its_key(name, key, value, message):
    with pytest.raises(InputError, match=re.escape(message)) as raised:
        decoder_config({**hf_config(name).to_dict(), key: value})
    assert key in str(raised.value)


@pytest.mark.parametrize("values", [None, 3, "llama", [], [["model_type", "llama"]]])
def test_what_is_no_object_is_refused(values):
    with pytest.raises(InputError, match=re.escape(f"config.json must be an object; got {values!r}")):
        decoder_config(values)


def test_null_is_the_default_but_for_caps_and_windows():
    llama, gemma = hf_config("llama").to_dict(), hf_config("gemma2").to_dict()
    keys = ("rms_norm_eps", "rope_theta", "rope_scaling", "tie_word_embeddings", "head_dim")
    for values in (llama, gemma):
        left = {key: value for key, value in values.items() if key not in keys}
        assert decoder_config(left | dict.fromkeys(keys)) == decoder_config(left)
    assert decoder_config(gemma | dict.fromkeys(CAPS)).score_cap is None
    assert decoder_config({key: value for key, value in gemma.items() if key not in CAPS}).score_cap == 50.0
    assert decoder_config(hf_config("mistral").to_dict() | {"sliding_window": None}).window is None


def test_heads_that_leave_no_width_are_refused():
    with pytest.raises(InputError, match="head_dim must be even and positive; got 0"):
        decoder_config(hf_config("llama").to_dict() | {"head_dim": None, "num_attention_heads": 64})


@functools.cache
def sample_values(name):
    return hf_config(name).to_dict()


ROTATIONS = ("rope_type", "type", "rope_theta", "factor", "low_freq_factor", "high_freq_factor", "full_attention",
             "sliding_attention", "original_max_position_embeddings", "partial_rotary_factor")  # fmt: skip
KEYS = sorted(
    {key for name in NAMES for key in sample_values(name)}
    | {*REQUIRED, *CAPS, "rope_theta", "rope_scaling", "rope_local_base_freq", "sliding_window_pattern", "use_mrope"}
    | {"layer_types", "sliding_window", "max_window_layers", "use_sliding_window", "query_pre_attn_scalar"}
)
WORDS = ["default", "linear", "llama3", "yarn", "sliding_attention", "full_attention", "LlamaModel", *FAMILIES]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(-1, 9) | st.floats() | st.sampled_from(WORDS) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(ROTATIONS), inner, max_size=5)
        | st.dictionaries(st.text(), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(NAMES), st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=3))
def test_any_json_gives_a_whole_configuration_or_an_input_error(name, change):
    try:
        config = decoder_config(sample_values(name) | change)
    except InputError:
        return
    assert DecoderConfig(**json.loads(json.dumps(dataclasses.asdict(config), allow_nan=False))) == config
    assert hash(config) == hash(dataclasses.replace(config))


@settings(max_examples=100, deadline=None)
@given(VALUES)
def test_any_json_at_all_gives_an_input_error(values):
    with pytest.raises(InputError):
        decoder_config(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qk_norm": True}, r"no family has this configuration; got qk_norm"),
        ({"scale_embed": True}, r"no family has this configuration; got scale_embed\. The nearest family, qwen2"),
        ({"final_cap": 30.0}, r"got final_cap\. The nearest family"),
    ],
)
def test_a_configuration_of_no_family_is_refused_by_name(change, message):
    with pytest.raises(InputError, match=message):
        family_config(DecoderConfig(**{"scale_embed": False, **change}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "relu"}, "unknown activation; got relu. Use one of silu, gelu_tanh"),
        ({"window": 0}, "window must be positive; got 0"),
        ({"final_cap": -1.0}, "final_cap must be positive"),
        ({"local": (True, False)}, "local layers need a window"),
        ({"window": 4, "local": (True, False, True)}, "local must tell 2 layers apart"),
        ({"window": 4, "local": (True, True)}, "local must tell 2 layers apart"),
        ({"rope_scaling": {"kind": "yarn"}}, "unknown kind; got yarn"),
        ({"rope_scaling": {"kind": "linear", "factor": 0.0}}, "impossible rope_scaling"),
        ({"rope_scaling": {"kind": "linear", "factor": NAN}}, "impossible rope_scaling"),
        ({"norm_eps": NAN}, "norm_eps must be positive; got nan"),
        ({"rope_theta": -1.0}, r"rope_theta must be positive; got -1\.0"),
        ({"final_cap": NAN}, "final_cap must be positive; got nan"),
        ({"head_dim": 0}, "head_dim must be even and positive; got 0"),
    ],
)
def test_impossible_configurations_are_refused_by_name(change, message):
    with pytest.raises(InputError, match=message):
        DecoderConfig(**change)
