"""A trained model on disk: model.json (kind, sizes, where it comes from), tokenizer.model, weights/ (orbax).

Written in a hidden folder and renamed at the end, so that a folder with a model.json is whole.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jraggym.checkpoint import Checkpointer
from jraggym.errors import InputError
from jraggym.models.critic import critic_specs
from jraggym.models.decoder import DecoderConfig, is_spec, specs
from jraggym.text.tokenizer import SentencePieceTokenizer

KINDS = ("actor", "critic")


@dataclass(frozen=True)
class Model:
    """An actor (weights: Decoder) or a critic (weights: Critic) with the tokenizer it was trained with."""

    kind: str
    config: DecoderConfig
    tokenizer: SentencePieceTokenizer
    weights: Any
    about: dict[str, Any]  # JSON values: how it was made


def save_model(folder: str | Path, model: Model) -> None:
    """Writes a model; one that is already there is replaced. Raises InputError when the folder cannot be written."""
    folder = Path(folder)
    building, old = (folder.with_name(f".{folder.name}.{state}") for state in ("building", "old"))
    try:
        for left in (building, old):
            shutil.rmtree(left, ignore_errors=True)
        building.mkdir(parents=True)
        likelihood = model.kind == "critic" and model.weights.likelihood is not None
        head = {"kind": model.kind, "likelihood": likelihood, "config": dataclasses.asdict(model.config)}
        (building / "model.json").write_text(json.dumps({**head, "about": model.about}, indent=1))
        (building / "tokenizer.model").write_bytes(model.tokenizer.model)
        Checkpointer(building / "weights").save(0, jax.tree.map(jnp.asarray, model.weights), {})
        if folder.exists():
            os.replace(folder, old)
        os.replace(building, folder)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise InputError(f"cannot write the model {folder}", got=error, remedy="Name another folder.") from error


def load_model(folder: str | Path, kind: str) -> Model:
    """Reads a model; raises InputError when it is not there, of another kind, or damaged."""
    path = Path(folder) / "model.json"
    try:
        found = json.loads(path.read_text())
        config, about, likelihood = DecoderConfig(**found["config"]), found["about"], found["likelihood"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        remedy = "Name a folder that train.sft, train.dpo, train.grpo, train.ppo or train.critic wrote."
        raise InputError(f"no model in {folder}", got=error, remedy=remedy) from error
    if found.get("kind") != kind:
        raise InputError(f"{folder} holds no {kind}", got=found.get("kind"), remedy=f"Name a folder with a {kind}.")
    table = specs(config) if kind == "actor" else critic_specs(config, likelihood=likelihood)
    target = jax.tree.map(lambda spec: jax.ShapeDtypeStruct(spec.shape, jnp.float32), table, is_leaf=is_spec)
    weights, _ = Checkpointer(Path(folder) / "weights").restore(target)
    return Model(kind, config, SentencePieceTokenizer.load(Path(folder) / "tokenizer.model"), weights, about)
