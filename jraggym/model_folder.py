"""A trained model on disk: model.json (kind, sizes, where it comes from), its tokenizer, weights/ (orbax).

The tokenizer is tokenizer.model (SentencePiece) or the folder tokenizer/ (Hugging Face); adapters/, where they were
trained, is a folder for PEFT.

Written in a hidden folder and renamed at the end, so that a folder with a model.json is whole.
"""

from __future__ import annotations

import dataclasses
import json
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jraggym.checkpoint import Checkpointer
from jraggym.errors import InputError
from jraggym.hosts import agreed, fetch, lead, share
from jraggym.models.critic import critic_specs
from jraggym.models.decoder import DecoderConfig, is_spec, specs
from jraggym.porting.peft import PeftAdapters, write_adapters
from jraggym.sharding import shardings
from jraggym.text.huggingface import HuggingFaceTokenizer
from jraggym.text.tokenizer import SentencePieceTokenizer
from jraggym.whole import whole_folder

KINDS = ("actor", "critic")


@dataclass(frozen=True)
class Model:
    """An actor (weights: Decoder) or a critic (weights: Critic) with the tokenizer it was trained with."""

    kind: str
    config: DecoderConfig
    tokenizer: SentencePieceTokenizer | HuggingFaceTokenizer
    weights: Any
    about: dict[str, Any]  # JSON values: how it was made
    adapters: PeftAdapters | None = None  # what was trained, where that was adapters; they are in the weights, too


def save_model(folder: str | Path, model: Model) -> None:
    """Writes a model; one that is already there is replaced. Raises InputError when the folder cannot be written.

    All processes of a job call this, and process 0 writes what is no weight; the folder lies where all see it.
    """
    likelihood = model.kind == "critic" and model.weights.likelihood is not None
    head = {"kind": model.kind, "likelihood": likelihood, "config": dataclasses.asdict(model.config)}
    model = dataclasses.replace(model, adapters=fetch(model.adapters))
    with ExitStack() as stack:
        building = agreed(stack.enter_context(whole_folder(folder)) if lead() else None)
        if lead():
            _write_head(building, head, model)
        Checkpointer(building / "weights").save(0, jax.tree.map(jnp.asarray, model.weights), {})
    share(None)  # it has its name


def _write_head(building: Path, head: dict[str, Any], model: Model) -> None:
    """All of a model but the weights."""
    (building / "model.json").write_text(json.dumps({**head, "about": model.about}, indent=1))
    if isinstance(model.tokenizer, SentencePieceTokenizer):
        (building / "tokenizer.model").write_bytes(model.tokenizer.model)
    else:
        model.tokenizer.save(building / "tokenizer")
    if model.adapters is not None:
        base = str(model.about.get("base", ""))
        write_adapters(building / "adapters", model.adapters, model.config, base=base)


def load_model(folder: str | Path, kind: str, mesh: Mesh | None = None) -> Model:
    """Reads a model, onto `mesh` if given; raises InputError when it is not there, of another kind, or damaged."""
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
    if mesh is not None:
        places = shardings(table, mesh)
        target = jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), target, places)
    weights, _ = Checkpointer(Path(folder) / "weights").restore(target)
    return Model(kind, config, _tokenizer(Path(folder)), weights, about)


def _tokenizer(folder: Path) -> SentencePieceTokenizer | HuggingFaceTokenizer:
    if (folder / "tokenizer").is_dir():
        return HuggingFaceTokenizer.load(folder / "tokenizer")
    return SentencePieceTokenizer.load(folder / "tokenizer.model")
