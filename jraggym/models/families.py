"""The families of decoders that `transformers` knows, as one table of differences, and their config.json in and out.

Every key of a config.json is read, must have the one value that this decoder computes, is harmless, or is refused by
its name: nothing is ignored that could change a number.

    config = decoder_config(json.loads(path.read_text()))      a DecoderConfig
    values = family_config(config, eos_token_id=2)             a config.json that transformers.AutoConfig reads
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from jraggym.errors import InputError
from jraggym.models.architecture import DecoderConfig, RopeScaling
from jraggym.models.config_values import LARGEST, ConfigValues

SLIDING, FULL = "sliding_attention", "full_attention"
MOST_LAYERS = 9_999  # more are a damaged file


@dataclass(frozen=True)
class Family:
    """What sets a family apart: the fields of DecoderConfig that it fixes, and how its config.json says the others."""

    model_type: str
    name: str  # of its classes, as in LlamaForCausalLM
    fixed: Mapping[str, Any] = field(default_factory=dict)
    tied: bool = False  # where config.json does not say
    head_dim: int | None = None  # the same; None: hidden_size / num_attention_heads
    window: str = "none"  # which layers are local: "none", "all", "late", "listed"
    pattern: int = 0  # where "listed" layers are not listed: every which one is global
    caps: tuple[float | None, float | None] = (None, None)  # of scores and logits, where config.json does not say
    thetas: tuple[float, ...] = (10_000.0,)  # where config.json does not say: of all layers, or of (global, local)
    required: Mapping[str, tuple] = field(default_factory=dict)  # key -> the values that this decoder computes

    @property
    def architectures(self) -> tuple[str, ...]:
        """The classes whose trunk this is; the first is the language model."""
        text = {"Gemma3": "Gemma3Text"}.get(self.name, self.name)
        return f"{self.name}ForCausalLM", f"{text}ForSequenceClassification", f"{text}Model"


GEMMA = {
    "activation": "gelu_tanh", "post_norms": True, "gain_offset": True, "scale_embed": True, "qkv_bias": False
}  # fmt: skip
PLAIN = {"scale_embed": False, "qkv_bias": False}
SILU, NO_BIAS = {"hidden_act": ("silu",)}, {"attention_bias": (False,)}
GELU = dict.fromkeys(("hidden_act", "hidden_activation"), ("gelu_pytorch_tanh",))
CAUSAL = {"use_bidirectional_attention": (None, False)}

FAMILIES = (
    Family("llama", "Llama", PLAIN, required={**SILU, "mlp_bias": (False,), "rope_interleaved": (False,)}),
    Family("mistral", "Mistral", PLAIN, window="all", required=SILU),
    Family(
        "qwen2", "Qwen2", {**PLAIN, "qkv_bias": True}, window="late", required={**SILU, "use_mrope": (False,)}
    ),
    Family(
        "qwen3", "Qwen3", {**PLAIN, "qk_norm": True}, head_dim=128, window="late", required={**SILU, **NO_BIAS}
    ),
    Family(
        "gemma2", "Gemma2", GEMMA, tied=True, head_dim=256, window="listed", pattern=2, caps=(50.0, 30.0),
        required={**GELU, **NO_BIAS, **CAUSAL, "sliding_window_pattern": (None, 2)},
    ),
    Family(
        "gemma3_text", "Gemma3", {**GEMMA, "qk_norm": True}, tied=True, head_dim=256, window="listed", pattern=6,
        thetas=(1_000_000.0, 10_000.0), required={**GELU, **NO_BIAS, **CAUSAL},
    ),
)  # fmt: skip

SIZES = {  # keys that every config.json has
    "vocab_size": "vocab",
    "hidden_size": "model",
    "num_hidden_layers": "layers",
    "num_attention_heads": "query_heads",
    "intermediate_size": "feed_forward",
}
CAPS = {"attn_logit_softcapping": "score_cap", "final_logit_softcapping": "final_cap"}
REQUIRED: Mapping[str, tuple] = {  # of every family
    "attention_dropout": (0, None),
    "partial_rotary_factor": (1, None),
    "quantization_config": (None,),
    "auto_map": (None,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (False,),
    "pruned_heads": (None, {}),
    "chunk_size_feed_forward": (0,),
}
HARMLESS = frozenset(  # of training, generation, bookkeeping and classifiers' heads; no number of the trunk reads them
    "transformers_version torch_dtype dtype use_cache initializer_range max_position_embeddings bos_token_id "
    "eos_token_id pad_token_id sep_token_id decoder_start_token_id _name_or_path name_or_path tokenizer_class "
    "output_attentions output_hidden_states return_dict torchscript is_decoder cache_implementation pretraining_tp "
    "attn_implementation _attn_implementation _attn_implementation_autoset problem_type num_labels id2label label2id "
    "finetuning_task task_specific_params prefix is_llama_config unsloth_version unsloth_fixed use_bfloat16 "
    "temperature top_k top_p typical_p repetition_penalty length_penalty max_length min_length do_sample num_beams "
    "num_beam_groups diversity_penalty early_stopping num_return_sequences no_repeat_ngram_size bad_words_ids "
    "encoder_no_repeat_ngram_size exponential_decay_length_penalty suppress_tokens begin_suppress_tokens "
    "forced_bos_token_id forced_eos_token_id remove_invalid_values return_dict_in_generate output_scores".split()
)


def decoder_config(values: Mapping[str, Any]) -> DecoderConfig:
    """The configuration that a parsed config.json describes, in the spelling of transformers 4 or 5.

    Raises InputError, with the key's name, for a family, a key or a value that this decoder does not compute.
    """
    left = ConfigValues("config.json", values)
    family = _family(left)
    for key, allowed in {**REQUIRED, **family.required}.items():
        if (value := left.pop(key, allowed[0])) not in allowed:
            remedy = f"This decoder computes {family.model_type} with {key} = {allowed[0]!r} only."
            raise InputError(f"config.json: {key} is not supported", got=repr(value), remedy=remedy)
    missing = [key for key in SIZES if left.get(key) is None]
    if "num_key_value_heads" not in left and family.model_type != "llama":  # whose first files had none
        missing.append("num_key_value_heads")
    if missing:
        raise InputError("config.json lacks a size", got=f"no {', '.join(missing)}", remedy="Is the file whole?")
    said: dict[str, Any] = dict(family.fixed)
    for key, name in SIZES.items():
        said[name] = left.integer(key, most=MOST_LAYERS if name == "layers" else LARGEST)
    said["kv_heads"] = left.integer("num_key_value_heads", said["query_heads"])
    said["head_dim"] = left.integer("head_dim", family.head_dim or said["model"] // said["query_heads"])
    said["norm_eps"] = left.number("rms_norm_eps", 1e-6)
    said["tied"] = left.flag("tie_word_embeddings", family.tied)
    if family.model_type == "llama":
        said["qkv_bias"] = said["o_bias"] = left.flag("attention_bias", False)
    if family.fixed.get("post_norms"):  # Gemma
        said["query_scalar"] = left.number("query_pre_attn_scalar", 256.0)
        for (key, name), cap in zip(CAPS.items(), family.caps, strict=True):
            said[name] = left.number(key, None if key in left else cap)  # null: no cap
    said |= _windows(family, left, said["layers"])
    said |= _rope(family, left, said)
    if unknown := sorted(key for key in left.keys() - HARMLESS if left[key] is not None):
        got = ", ".join(f"{key} = {left[key]!r}" for key in unknown)
        remedy = f"Nothing in this decoder's {family.model_type} reads it; it might change the model."
        raise InputError("config.json: unknown settings", got=got, remedy=remedy)
    return DecoderConfig(**said)


def _family(left: ConfigValues) -> Family:
    """Takes the keys that name the family out of `left`."""
    found = left.pop("model_type", None)
    family = next((family for family in FAMILIES if family.model_type == found), None)
    if family is None:
        remedy = f"Use one of {', '.join(family.model_type for family in FAMILIES)}."
        raise InputError("config.json: unknown model_type", got=found, remedy=remedy)
    for name in left.name_list("architectures") or ():
        if name not in family.architectures:
            remedy = f"Use one of {', '.join(family.architectures)}."
            raise InputError("config.json: architectures is not supported", got=name, remedy=remedy)
    return family


def _windows(family: Family, left: ConfigValues, layers: int) -> dict[str, Any]:
    """The fields `window` and `local`; takes their keys out of `left`."""
    listed = left.name_list("layer_types")
    unsaid = None if family.window == "none" or "sliding_window" in left else 4096  # null: no window
    window = left.integer("sliding_window", unsaid)
    late, pattern = 28, family.pattern
    if family.window == "late":
        late = left.integer("max_window_layers", late, least=0)
        window = window if left.flag("use_sliding_window", False) else None
    if family.window == "listed":
        pattern = left.integer("_sliding_window_pattern", pattern)
        pattern = left.integer("sliding_window_pattern", pattern)
    if listed is None:
        local = {
            "none": lambda n: False,
            "all": lambda n: window is not None,
            "late": lambda n: window is not None and n >= late,
            "listed": lambda n: bool((n + 1) % pattern),
        }[family.window]
        listed = [SLIDING if local(n) else FULL for n in range(layers)]
    got = ", ".join(map(str, listed))
    if set(listed) - {SLIDING, FULL} or len(listed) != layers:
        remedy = f"Name {SLIDING} or {FULL} for each of the {layers} layers."
        raise InputError("config.json: layer_types is not supported", got=got, remedy=remedy)
    if window is None and SLIDING in listed:
        raise InputError("config.json: layer_types without a sliding_window", got=got, remedy="Set sliding_window.")
    if family.window == "none" and window is not None:
        remedy = f"{family.model_type} has no local layers; is it a mistral?"
        raise InputError("config.json: sliding_window is not supported", got=window, remedy=remedy)
    if family.window == "all" and window is not None and FULL in listed:
        remedy = f"All layers of {family.model_type} are local."
        raise InputError("config.json: layer_types is not supported", got=got, remedy=remedy)
    flags = tuple(kind == SLIDING for kind in listed)
    return {"window": window, "local": None if all(flags) else flags} if any(flags) else {}


def _rope(family: Family, left: ConfigValues, said: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of rotary positions; takes their keys out of `left`."""
    found, scaling = left.inner("rope_parameters"), left.inner("rope_scaling")
    theta = left.number("rope_theta", family.thetas[0])
    if len(family.thetas) == 1:
        each = [_rotation(said, theta) for said in (scaling, found) if said] or [(theta, RopeScaling())]
        if len({scaled for _, scaled in each}) > 1:
            got = "rope_scaling beside rope_parameters"
            raise InputError("config.json: two rotations that differ", got=got, remedy="Leave one out.")
        return {"rope_theta": each[-1][0], "rope_scaling": each[-1][1]}
    near = left.number("rope_local_base_freq", family.thetas[1])
    if unknown := found.keys() - {FULL, SLIDING}:
        remedy = f"Write one record for {FULL} and one for {SLIDING}."
        raise InputError("config.json: rope_parameters", got=", ".join(sorted(unknown)), remedy=remedy)
    far = found.inner(FULL)
    theta, scaled = _rotation(ConfigValues((scaling or far).name, {**far, **scaling}), theta)
    near, unscaled = _rotation(found.inner(SLIDING), near)
    if unscaled != RopeScaling():
        remedy = "Only global layers can have one."
        raise InputError("config.json: rope_parameters: scaling of local layers", got=unscaled.kind, remedy=remedy)
    return {"rope_theta": theta, "rope_scaling": scaled} | ({"local_rope_theta": near} if "window" in said else {})


ROTATION = {  # rope_type -> key -> field of RopeScaling
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor", "low_freq_factor": "low", "high_freq_factor": "high",
        "original_max_position_embeddings": "original",
    },
}  # fmt: skip


def _rotation(left: ConfigValues, theta: float) -> tuple[float, RopeScaling]:
    """Takes all keys out of `left`; `theta` is what holds where it has none."""
    theta = left.number("rope_theta", theta)
    old = left.pop("type", "default")
    kind = left.pop("rope_type", old)
    if kind not in list(ROTATION):  # a list: what JSON says may have no hash
        remedy = f"Use one of {', '.join(ROTATION)}."
        raise InputError(f"{left.name}: rope_type is not supported", got=kind, remedy=remedy)
    if (part := left.pop("partial_rotary_factor", 1)) not in (1, None):
        raise InputError(f"{left.name}: partial_rotary_factor is not supported", got=part, remedy="It must be 1.")
    keys = ROTATION[kind]
    if missing := ", ".join(sorted(key for key in keys if left.get(key) is None)):
        raise InputError(f"{left.name}: {kind} rotation lacks a key", got=f"no {missing}", remedy="Add it.")
    if unknown := ", ".join(sorted(left.keys() - keys.keys())):
        raise InputError(f"{left.name}: {kind} rotation with unknown keys", got=unknown, remedy="Leave them out.")
    said = {name: left.integer(key) if name == "original" else left.number(key) for key, name in keys.items()}
    return theta, RopeScaling("none" if kind == "default" else kind, **said)


def family_config(config: DecoderConfig, prefer: str | None = None, **more: Any) -> dict[str, Any]:
    """The config.json of the first family that describes this configuration; `decoder_config` reads it back.

    Args: prefer: the model_type to try first; more: keys to add, such as eos_token_id, max_position_embeddings, dtype.
    Raises InputError for a configuration that no family has, naming what is in the way. Scaled embeddings outside
      Gemma are one such thing: `portable` in tensor_names.py moves the factor into the table.
    """
    config = replace(config, dtype="float32", remat="none", attention="xla")  # of computing, not of the model
    unlike: dict[str, list[str]] = {}
    for family in sorted(FAMILIES, key=lambda family: family.model_type != prefer):
        values = _written(family, config)
        read = decoder_config(values)
        unlike[family.model_type] = [f.name for f in fields(read) if getattr(read, f.name) != getattr(config, f.name)]
        if read == config:
            return {**values, **more}
    nearest = min(unlike, key=lambda name: len(unlike[name]))
    remedy = f"The nearest family, {nearest}, has other values there."
    raise InputError("no family has this configuration", got=", ".join(unlike[nearest]), remedy=remedy)


def _written(family: Family, config: DecoderConfig) -> dict[str, Any]:
    values: dict[str, Any] = {
        "model_type": family.model_type,
        "architectures": [family.architectures[0]],
        **{key: getattr(config, name) for key, name in SIZES.items()},
        **{key: value for key, (value, *_) in family.required.items() if key.startswith("hidden_act")},
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "rope_theta": config.rope_theta,
        "max_position_embeddings": 131_072,
    }
    values |= {"attention_bias": config.o_bias} if family.model_type == "llama" else {}
    scaling = config.rope_scaling
    if scaling.kind != "none":
        keys = ROTATION[scaling.kind].items()
        values["rope_scaling"] = {"rope_type": scaling.kind, **{key: getattr(scaling, name) for key, name in keys}}
    if len(family.thetas) == 2:
        values["rope_local_base_freq"] = config.local_rope_theta or family.thetas[1]
    if family.fixed.get("post_norms"):
        scalar = config.query_scalar or config.head_dim
        values["query_pre_attn_scalar"] = int(scalar) if scalar == int(scalar) else scalar
        values |= {key: getattr(config, name) for key, name in CAPS.items()}
    if family.window != "none":
        values["sliding_window"] = config.window
    if family.window in ("late", "listed"):
        local = config.local or (config.window is not None,) * config.layers
        values["layer_types"] = [SLIDING if here else FULL for here in local]
    if family.window == "late":
        values["use_sliding_window"] = config.window is not None
        values["max_window_layers"] = values["layer_types"].count(FULL)
    return values
