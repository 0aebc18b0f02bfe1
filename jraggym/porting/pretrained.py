"""Models of Hugging Face folders: in, to be trained, and out, to be served.

model = load_pretrained("owner/repository@commit", "actor")     or a local folder
export_model(model, "served")                                   AutoModelForCausalLM.from_pretrained("served")
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from jraggym.errors import InputError
from jraggym.model_folder import KINDS, Model, load_model
from jraggym.models.critic import Critic, critic_specs
from jraggym.models.decoder import DecoderConfig, specs
from jraggym.models.families import FAMILIES, decoder_config, family_config
from jraggym.models.tensor_names import TensorName, portable, tensor_names
from jraggym.porting.card import write_card
from jraggym.porting.hub import local_files
from jraggym.porting.peft import CONFIG, TASKS, base_of
from jraggym.porting.reading import Checkpoint, read_weights
from jraggym.porting.writing import SHARD_BYTES, write_weights
from jraggym.text.actions import STOPS
from jraggym.text.huggingface import HuggingFaceTokenizer
from jraggym.text.tokenizer import SentencePieceTokenizer
from jraggym.text.tokenizer_export import huggingface_files
from jraggym.whole import whole_folder

PIECES = "sentencepiece.model"  # our tokenizer as it was trained, beside its Hugging Face files
KEPT = (
    "model_type",
    "max_position_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)  # of an imported config.json
_HEAD = TensorName("score.weight", row=True)
DTYPES = ("float32", "bfloat16", "float16")


def open_model(name: str | Path, kind: str, mesh: Mesh | None = None) -> Model:
    """A model of ours, of a Hugging Face folder or of the hub, on `mesh`; see `load_model` and `load_pretrained`."""
    if (Path(name) / "model.json").is_file():
        return load_model(name, kind, mesh)
    return load_pretrained(name, kind, mesh=mesh)


def load_pretrained(name: str | Path, kind: str, *, mesh: Mesh | None = None, dtype: str = "float32") -> Model:
    """An actor (a causal language model) or a critic (a sequence classifier with one label), on `mesh` if given.

    Args: name: a folder, or owner/repository@revision on the hub; dtype: of the weights.
    Raises InputError for a model that is not there, not of this kind or not supported, and for tensors that do not fit.
    """
    source = local_files(name)
    values = read_config(source.folder)
    config, table, names = _plan(decoder_config(values), kind, values)
    checkpoint = Checkpoint.open(source.folder)
    unused = [tensor for tensor in checkpoint.shapes if tensor.endswith("rotary_emb.inv_freq")]
    if config.tied:
        unused.append("lm_head.weight")
    weights = read_weights(checkpoint, table, names, mesh=mesh, dtype=dtype, unused=unused)
    pieces = source.folder / PIECES
    tokenizer: Any = (
        SentencePieceTokenizer.load(pieces) if pieces.is_file() else HuggingFaceTokenizer.load(source.folder)
    )
    fits = tokenizer.fits if isinstance(tokenizer, HuggingFaceTokenizer) else tokenizer.vocab_size.__le__
    if not fits(config.vocab):
        got = f"{tokenizer.vocab_size} tokens for {config.vocab} rows"
        raise InputError(f"the tokenizer of {name} has more tokens than the model", got=got, remedy="Use its own one.")
    about = {"source": source.name, "config": {key: values[key] for key in KEPT if values.get(key) is not None}}
    return Model(kind, config, tokenizer, weights, about)


def read_config(folder: Path) -> dict[str, Any]:
    """The values of a folder's config.json; raises InputError when there is none."""
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        values.keys()
    except (OSError, ValueError, AttributeError) as error:
        remedy = "Name a folder of train.*, or one that transformers' save_pretrained wrote."
        raise InputError(f"no model in {folder}", got=error, remedy=remedy) from error
    return values


def _plan(config: DecoderConfig, kind: str, values: dict[str, Any]) -> tuple[DecoderConfig, Any, Any]:
    """Configuration, weight table and tensor names of a kind; a classifier's trunk has no unembedding."""
    if kind not in KINDS:
        raise InputError("unknown kind of model", got=kind, remedy=f"Use one of {', '.join(KINDS)}.")
    found = (values.get("architectures") or ["?ForCausalLM"])[0]
    wanted = "ForCausalLM" if kind == "actor" else "ForSequenceClassification"
    if not found.endswith(wanted):
        raise InputError(f"this model is no {kind}", got=found, remedy=f"Use one whose architecture ends in {wanted}.")
    if kind == "actor":
        return config, specs(config), tensor_names(config)
    config = dataclasses.replace(config, tied=True)
    return config, critic_specs(config), Critic(tensor_names(config), _HEAD)


def export_model(model: Model, folder: str | Path, *, dtype: str = "float32", limit: int = SHARD_BYTES) -> None:
    """Writes what `AutoModelForCausalLM` (actor) or `AutoModelForSequenceClassification` (critic) reads, whole or not.

    With the weights go config.json, generation_config.json (an action ends generation), the tokenizer's files and a
    model card. Args: dtype: of the weights on disk; limit: bytes of one file.
    Raises InputError for a model that has no counterpart in transformers.
    """
    if dtype not in DTYPES:
        raise InputError("unknown dtype", got=dtype, remedy=f"Use one of {', '.join(DTYPES)}.")
    trunk = model.weights if model.kind == "actor" else model.weights.trunk
    config, trunk = portable(model.config, trunk)
    weights: Any = trunk
    table: Any = specs(config)
    names: Any = tensor_names(config)
    if model.kind == "critic":
        if model.weights.likelihood is not None:
            got = "a score that counts the action's log-probability too"
            remedy = "Train it with --no-likelihood: a sequence classifier has a score head alone."
            raise InputError("this critic has no counterpart in transformers", got=got, remedy=remedy)
        config = dataclasses.replace(config, tied=True)
        weights = Critic(dataclasses.replace(trunk, unembed=None), model.weights.head)
        table, names = critic_specs(config), Critic(tensor_names(config), _HEAD)
    with whole_folder(folder) as building:
        if isinstance(model.tokenizer, SentencePieceTokenizer):
            huggingface_files(model.tokenizer, building)
            (building / PIECES).write_bytes(model.tokenizer.model)
        else:
            model.tokenizer.save(building)
        _write_configs(building, model, config, dtype)
        write_weights(building, weights, table, names, dtype=dtype, limit=limit)
        write_card(building, model.kind, model.about)


def _write_configs(folder: Path, model: Model, config: DecoderConfig, dtype: str) -> None:
    tokenizer = model.tokenizer
    if isinstance(tokenizer, SentencePieceTokenizer):
        stops = [tokenizer.token_id(stop) for stop in STOPS]
    else:
        stops = list(tokenizer.end_ids)
    kept = dict(model.about.get("config", {}))
    more = {"pad_token_id": tokenizer.pad_id, "eos_token_id": stops, **kept, "dtype": dtype}
    values = family_config(config, prefer=more.pop("model_type", None), **more)
    if model.kind == "critic":
        family = next(family for family in FAMILIES if family.model_type == values["model_type"])
        values |= {"architectures": [family.architectures[1]], "id2label": {"0": "score"}, "label2id": {"score": 0}}
        values["pad_token_id"] = tokenizer.pad_id  # the classifier reads the last token that is not this one
    else:
        generation = {"eos_token_id": stops, "pad_token_id": tokenizer.pad_id, "do_sample": False}
        (folder / "generation_config.json").write_text(json.dumps(generation, indent=1))
    (folder / "config.json").write_text(json.dumps(values, indent=1))


def copy_adapters(model: str | Path, folder: str | Path, *, base: str = "") -> None:
    """The adapters that a model of ours was trained by, as a PEFT folder with a card.

    `base` names the model that they belong to, as PeftModel will look for it. Raises InputError when there are none.
    """
    source = Path(model) / "adapters"
    settings = source / CONFIG
    if not settings.is_file():
        remedy = "Train with --lora.rank 16."
        raise InputError(f"{model} was not trained by adapters", got=f"no {settings}", remedy=remedy)
    found, described = json.loads(settings.read_text()), json.loads((Path(model) / "model.json").read_text())
    about = described["about"]
    if described["likelihood"]:
        remedy = "Train it with --no-likelihood."
        raise InputError("a critic that counts likelihoods has no counterpart in PEFT", got=str(model), remedy=remedy)
    if base:
        found |= base_of(base)
    elif (Path(found["base_model_name_or_path"]) / "model.json").is_file():
        remedy = "Export it first, and name what you get: --base FOLDER."
        got = found["base_model_name_or_path"]
        raise InputError("the adapters' base is no Hugging Face model", got=got, remedy=remedy)
    with whole_folder(folder) as building:
        shutil.copytree(source, building, dirs_exist_ok=True)
        (building / CONFIG).write_text(json.dumps(found, indent=1))
        kind = "adapters" if found["task_type"] == TASKS["actor"] else "critic adapters"
        write_card(building, kind, about, base=found["base_model_name_or_path"])
