"""LoRA adapters as PEFT has them: adapter_config.json, and matrices B A [out, in] where ours are A B [in, out]."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import Mesh

from jraggym.errors import InputError
from jraggym.models.critic import critic_specs
from jraggym.models.decoder import DecoderConfig
from jraggym.models.lora import Adapters, Lora, lora_specs
from jraggym.models.tensor_names import TensorName, tensor_names
from jraggym.porting.reading import Checkpoint, read_weights
from jraggym.porting.writing import write_weights
from jraggym.whole import whole_folder

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TASKS = {"actor": "CAUSAL_LM", "critic": "SEQ_CLS"}
# What this module does; an adapter that asks for anything else is refused by name.
_REQUIRED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_dora": (False,),
    "fan_in_fan_out": (False,),
    "layers_to_transform": (None,),
    "layers_pattern": (None,),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    "lora_bias": (False,),
    "use_qalora": (False,),
    "alora_invocation_tokens": (None,),
    "megatron_config": (None,),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),  # others change the base, too
}
_READ = frozenset(
    "r lora_alpha lora_dropout use_rslora task_type modules_to_save target_modules exclude_modules inference_mode "
    "base_model_name_or_path revision auto_mapping peft_version megatron_core qalora_group_size eva_config "
    "ensure_weight_tying".split()
)


class PeftAdapters(NamedTuple):
    """Adapters and what they need to act."""

    lora: Lora
    adapters: Adapters
    head: Any = None  # [D] of a critic whose score was trained beside them


def read_adapters(folder: str | Path, config: DecoderConfig, *, mesh: Mesh | None = None) -> PeftAdapters:
    """Adapters of a decoder's layers, in float32.

    Raises InputError for missing files, settings that are not supported (by name), and tensors that do not fit.
    """
    folder = Path(folder)
    settings = _settings(folder / CONFIG)
    checkpoint = Checkpoint.open(folder, WEIGHTS)
    own = vars(tensor_names(config).layers)
    leaves = tuple(
        leaf
        for leaf, disk in own.items()
        if disk and disk.transposed and _pair(disk)["a"].name.format(layer=0) in checkpoint.shapes
    )
    if not leaves:
        got = ", ".join(list(checkpoint.shapes)[:4])
        raise InputError(
            f"{folder} has no adapter of this model's matrices", got=got, remedy="Give its own base model."
        )
    rank, alpha = int(settings["r"]), float(settings["lora_alpha"])
    if settings.get("use_rslora"):
        alpha *= math.sqrt(rank)  # scale = alpha / sqrt(rank)
    lora = Lora(rank, alpha, float(settings.get("lora_dropout") or 0.0), leaves)
    table: dict[str, Any] = {"layers": lora_specs(config, lora)}
    names: dict[str, Any] = {"layers": _names(config, lora)}
    if (score := "base_model.model.score.weight") in checkpoint.shapes:
        table["head"], names["head"] = critic_specs(config).head, TensorName(score, row=True)
    found = read_weights(checkpoint, table, names, mesh=mesh)
    return PeftAdapters(lora, found["layers"], found.get("head"))


def write_adapters(
    folder: str | Path, found: PeftAdapters, config: DecoderConfig, *, base: str, dtype: str = "float32"
) -> None:
    """Writes what `PeftModel.from_pretrained(base_model, folder)` reads.

    `base` names the model that the adapters belong to: a folder, or owner/repository@revision.
    """
    own = vars(tensor_names(config).layers)
    modules = sorted({own[leaf].name.split(".")[-2] for leaf in found.lora.leaves})
    settings = {
        "peft_type": "LORA",
        "task_type": TASKS["actor" if found.head is None else "critic"],
        **base_of(base),
        "r": found.lora.rank,
        "lora_alpha": found.lora.alpha,
        "lora_dropout": found.lora.dropout,
        "target_modules": modules,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "modules_to_save": None if found.head is None else ["score"],
    }
    weights: dict[str, Any] = {"layers": found.adapters}
    table: dict[str, Any] = {"layers": lora_specs(config, found.lora)}
    names: dict[str, Any] = {"layers": _names(config, found.lora)}
    if found.head is not None:
        weights["head"], table["head"] = found.head, critic_specs(config).head
        names["head"] = TensorName("base_model.model.score.weight", row=True)
    with whole_folder(folder) as building:
        write_weights(building, weights, table, names, dtype=dtype, single=WEIGHTS)
        (building / CONFIG).write_text(json.dumps(settings, indent=1))


def base_of(name: str) -> dict[str, str | None]:
    """The settings by which PEFT finds the base model again."""
    repository, _, revision = name.partition("@")
    return {"base_model_name_or_path": repository, "revision": revision or None}


def _names(config: DecoderConfig, lora: Lora) -> dict[str, dict[str, TensorName]]:
    own = vars(tensor_names(config).layers)
    return {leaf: _pair(own[leaf]) for leaf in lora.leaves}


def _pair(disk: TensorName) -> dict[str, TensorName]:
    stem = "base_model.model." + disk.name.removesuffix(".weight")
    return {letter: TensorName(f"{stem}.lora_{letter.upper()}.weight", transposed=True) for letter in "ab"}


def _settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        int(settings["r"]), float(settings["lora_alpha"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"cannot read {path}", got=error, remedy="Name a folder that PEFT wrote.") from error
    saved = settings.get("modules_to_save") or []
    allowed = {name: settings.get(name, known[0]) in known for name, known in _REQUIRED.items()}
    allowed["modules_to_save"] = isinstance(saved, list) and {*map(str, saved)} <= {"score", "classifier"}
    for name, value in settings.items():  # what is not known is off, or refused
        if not allowed.get(name, name in _READ or not value):
            remedy = "Merge the adapters with PEFT first."
            raise InputError(f"{path}: this {name} is not supported", got=repr(value), remedy=remedy)
    return settings
