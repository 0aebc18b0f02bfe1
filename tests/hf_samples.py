"""Tiny random models of every family, made by transformers, and their weights as our tree and back."""

import functools
from typing import Any

import jax
import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models import auto

from jraggym.models.decoder import Decoder, DecoderConfig, Layer, specs
from jraggym.models.families import decoder_config
from jraggym.models.tensor_names import tensor_names

SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 256, "initializer_range": 0.2, "rms_norm_eps": 1e-5,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None,  # torch gives the embedding of padding no gradient
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 100.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 500.0}
GEMMA = {"head_dim": 12, "query_pre_attn_scalar": 20}  # caps and windows so small that they tell

FAMILIES: dict[str, dict[str, Any]] = {  # name of the sample -> what its config says beside SIZES
    "llama": {"model_type": "llama", "tie_word_embeddings": True, "rope_parameters": ROPE},
    "llama3": {"model_type": "llama", "num_key_value_heads": 1, "head_dim": 12, "rope_parameters": LLAMA3},
    "llama-bias": {"model_type": "llama", "attention_bias": True, "rope_parameters": ROPE},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True, "rope_parameters": ROPE},
    "qwen2-late": {
        "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1,
        "rope_parameters": ROPE,
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 12, "rope_parameters": ROPE},
    "mistral": {"model_type": "mistral", "head_dim": 12, "sliding_window": 5, "rope_parameters": ROPE},
    "gemma2": {
        "model_type": "gemma2", **GEMMA, "num_hidden_layers": 4, "sliding_window": 5, "attn_logit_softcapping": 1.5,
        "final_logit_softcapping": 2.5, "rope_parameters": ROPE,
    },
    "gemma3": {
        "model_type": "gemma3_text", **GEMMA, "num_hidden_layers": 7, "sliding_window": 5,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 2000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    },
}  # fmt: skip


def hf_config(name: str) -> Any:
    values = {**SIZES, **FAMILIES[name]}
    return auto.AutoConfig.for_model(values.pop("model_type"), **values)


@functools.cache
def hf_model(name: str) -> Any:
    """A random model in float32 with eager attention, whose gains and biases are random too."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(hf_config(name), attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@functools.cache
def sample_model(name: str) -> tuple[Any, DecoderConfig, Decoder]:
    """The model of transformers, the configuration read from its config.json, and its weights as our tree."""
    model = hf_model(name)
    config = decoder_config(model.config.to_dict())
    return model, config, from_state({k: v.numpy() for k, v in model.state_dict().items()}, config)


def from_state(state: dict[str, np.ndarray], config: DecoderConfig) -> Decoder:
    """Our tree of a state dict; a name that is missing or left over is an error, and so is another shape."""
    used = set()

    def read(name, transposed):
        used.add(name)
        return state[name].T if transposed else state[name]

    def leaf(spot, spec):
        if "{layer}" not in spot.name:
            found = read(spot.name, spot.transposed)
        else:
            found = np.stack([read(spot.name.format(layer=n), spot.transposed) for n in range(config.layers)])
        assert found.shape == spec.shape, (spot, found.shape, spec.shape)
        return found

    weights = jax.tree.map(leaf, tensor_names(config), specs(config))
    left = state.keys() - used - ({"lm_head.weight"} if config.tied else set())
    assert not left, left
    return weights


def to_state(weights: Decoder, config: DecoderConfig) -> dict[str, np.ndarray]:
    """The state dict of our tree, with the tied unembedding under its own name, as torch lists it."""
    state = {}

    def write(spot, leaf):
        parts = {spot.name: leaf}
        if "{layer}" in spot.name:
            parts = {spot.name.format(layer=n): part for n, part in enumerate(leaf)}
        state.update({name: np.array(part.T if spot.transposed else part) for name, part in parts.items()})

    jax.tree.map(write, tensor_names(config), weights)
    return {"lm_head.weight": state["model.embed_tokens.weight"], **state} if config.tied else state


def until_layer(weights: Decoder, count: int) -> Decoder:
    """Weights whose layers from `count` on write nothing, so that the last hidden state is that of layer `count`."""

    def silent(leaf):
        return np.concatenate([leaf[:count], 0 * leaf[count:]])

    layers: Layer = weights.layers
    bias = None if layers.o_bias is None else silent(layers.o_bias)
    return weights.replace(layers=layers.replace(o=silent(layers.o), o_bias=bias, down=silent(layers.down)))


def write_letters(path):
    """A folder's tokenizer: single letters, fewer than the samples have rows."""
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ<>/"
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    end = "<|endoftext|>"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, pad_token=end).save_pretrained(path)
