"""Where each weight of a decoder is in a checkpoint of its family: the tensor's name, and which way round it lies."""

from __future__ import annotations

from dataclasses import dataclass, replace

from jraggym.models.architecture import Decoder, DecoderConfig, Layer


@dataclass(frozen=True, slots=True)
class TensorName:
    """A tensor on disk; a leaf of a tree like `specs(config)`."""

    name: str  # with {layer} where each layer has its own and ours are stacked
    transposed: bool = False  # [out, in] on disk, [in, out] here


def tensor_names(config: DecoderConfig) -> Decoder:
    """A tree like `specs(config)` with a `TensorName` for each weight."""

    def gain(name: str, there: bool = True) -> TensorName | None:
        return TensorName(f"model.layers.{{layer}}.{name}.weight") if there else None

    def matrix(name: str) -> TensorName:
        return TensorName(f"model.layers.{{layer}}.{name}_proj.weight", transposed=True)

    def bias(name: str) -> TensorName | None:
        return TensorName(f"model.layers.{{layer}}.self_attn.{name}_proj.bias") if config.qkv_bias else None

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
        ),
        final_norm=TensorName("model.norm.weight"),
        unembed=None if config.tied else TensorName("lm_head.weight", transposed=True),
    )


def unscaled(config: DecoderConfig, weights: Decoder) -> tuple[DecoderConfig, Decoder]:
    """The same model with the factor sqrt(D) inside its embedding table, as all families but Gemma have it.

    A tied table serves as two then: the scaled one, and the unembedding as it was. Nothing else is touched, and a
    configuration that does not scale, or is Gemma's, comes back as it is.
    """
    if not config.scale_embed or config.gain_offset:
        return config, weights
    unembed = weights.embed.T if config.tied else weights.unembed
    scaled = replace(weights, embed=weights.embed * config.model**0.5, unembed=unembed)
    return replace(config, scale_embed=False, tied=False), scaled
