"""Where each weight of a decoder is in a checkpoint of its family: the tensor's name, and which way round it lies."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax.numpy as jnp

from jraggym.models.architecture import Decoder, DecoderConfig, Layer


@dataclass(frozen=True, slots=True)
class TensorName:
    """A tensor on disk; a leaf of a tree like `specs(config)`."""

    name: str  # with {layer} where each layer has its own and ours are stacked
    transposed: bool = False  # [out, in] on disk, [in, out] here
    row: bool = False  # [1, D] on disk, [D] here


def tensor_names(config: DecoderConfig) -> Decoder:
    """A tree like `specs(config)` with a `TensorName` for each weight."""

    def gain(name: str, there: bool = True) -> TensorName | None:
        return TensorName(f"model.layers.{{layer}}.{name}.weight") if there else None

    def matrix(name: str) -> TensorName:
        return TensorName(f"model.layers.{{layer}}.{name}_proj.weight", transposed=True)

    def bias(name: str, there: bool = config.qkv_bias) -> TensorName | None:
        return TensorName(f"model.layers.{{layer}}.self_attn.{name}_proj.bias") if there else None

    return Decoder(
        embed=TensorName("model.embed_tokens.weight"),
        layers=Layer(
            attention_norm=gain("input_layernorm"),
            **{name: matrix(f"self_attn.{name}") for name in "qkvo"},
            **{f"{name}_bias": bias(name) for name in "qkv"},
            # Where what is written is normalised too, the name of the norm before the feed-forward block is the
            # other's, which comes after attention.
            mlp_norm=gain("pre_feedforward_layernorm" if config.post_norms else "post_attention_layernorm"),
            **{name: matrix(f"mlp.{name}") for name in ("gate", "up", "down")},
            q_norm=gain("self_attn.q_norm", config.qk_norm),
            k_norm=gain("self_attn.k_norm", config.qk_norm),
            attention_post_norm=gain("post_attention_layernorm", config.post_norms),
            mlp_post_norm=gain("post_feedforward_layernorm", config.post_norms),
            o_bias=bias("o", config.o_bias),
        ),
        final_norm=TensorName("model.norm.weight"),
        unembed=None if config.tied else TensorName("lm_head.weight", transposed=True),
    )


def portable(config: DecoderConfig, weights: Decoder) -> tuple[DecoderConfig, Decoder]:
    """The same model as a family of transformers has it: ours, with its scaled embeddings, becomes an untied Llama.

    The factor sqrt(D) goes into the embedding table, and a tied table serves as two then: the scaled one, and the
    unembedding as it was. Llama's attention has a bias everywhere or nowhere: that of its output is zero. (Not Qwen2,
    which has biases where ours has: transformers gives a model of that name Qwen's tokenizer, whatever its files say.)
    A configuration that does not scale, or is Gemma's, comes back as it is.
    """
    if not config.scale_embed or config.gain_offset:
        return config, weights
    layers = weights.layers
    if config.qkv_bias and not config.o_bias:
        layers = replace(layers, o_bias=jnp.zeros((config.layers, config.model)))
    unembed = weights.embed.T if config.tied else weights.unembed
    moved = replace(weights, embed=weights.embed * config.model**0.5, unembed=unembed, layers=layers)
    return replace(config, scale_embed=False, tied=False, o_bias=config.qkv_bias), moved
