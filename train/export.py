"""A trained model as a folder for PyTorch tools: python -m train.export --model runs/dpo/model --out served

actor      AutoModelForCausalLM.from_pretrained("served")
critic     AutoModelForSequenceClassification.from_pretrained("served"): the score of a prompt and an action
adapters   PeftModel.from_pretrained(base, "served"), of a model that was trained with --lora.rank
encoder    SentenceTransformer("served"), of a BERT encoder's folder; of two towers, two folders in it

With the first two go the tokenizer, a generation config that stops where an action ends, and a model card. `--model`
may also be a Hugging Face folder or owner/repository@revision, to convert its types or to merge adapters of PEFT.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from jraggym.errors import InputError, exit_on_input_error
from jraggym.model_folder import Model
from jraggym.models.bert_encoder import BertEncoder, save_encoder
from jraggym.models.critic import Critic
from jraggym.models.encoders import guess
from jraggym.models.lora import merge
from jraggym.porting.hub import local_files
from jraggym.porting.peft import read_adapters
from jraggym.porting.pretrained import copy_adapters, export_model, open_model, read_config
from jraggym.preemption import preemptible


@dataclass(frozen=True)
class Arguments:
    """What to export, and where to."""

    model: Path
    """Folder of a train.* job's model, a Hugging Face folder, or owner/repository@revision."""
    out: Path
    """The new folder; one that is there already is refused unless --replace."""
    kind: Literal["actor", "critic", "adapters", "encoder"] | None = None
    """What the model is; unless told, model.json or config.json says it."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the weights on disk; adapters stay float32."""
    base: str = ""
    """For adapters: the name of the exported starting model that they belong to."""
    merge: Path | None = None
    """PEFT adapters to merge into an actor: a folder, or owner/repository@revision. Those of a critic make it one."""
    shard: float = 5.0
    """Gigabytes of one file of weights at most."""
    family: str | None = None
    """Of an encoder whose folder says no more: minilm, bge, e5, contriever, specter or medcpt."""
    documents: Path | None = None
    """Of an encoder with two towers: the folder of the one for documents."""
    replace: bool = False
    """Take the place of a folder that is there already."""


def run(arguments: Arguments) -> None:
    """Exports one model; raises InputError when it cannot be read, has no counterpart, or the folder is taken."""
    if arguments.out.exists() and not arguments.replace:
        raise InputError(f"{arguments.out} exists", got="no --replace", remedy="Name another folder, or add --replace.")
    kind = arguments.kind or _kind(local_files(arguments.model).folder)
    if arguments.merge is not None and kind != "actor":
        raise InputError("adapters are merged into actors", got=kind, remedy="Leave out --merge.")
    if kind == "adapters":
        copy_adapters(arguments.model, arguments.out, base=arguments.base)
    elif kind == "encoder":
        documents = arguments.documents and local_files(arguments.documents).folder
        published = str(arguments.model).partition("@")[0]  # of the hub; a folder is named by its commit
        family = arguments.family or (published if guess(published) else None)
        save_encoder(arguments.out, BertEncoder.load(local_files(arguments.model).folder, family, documents))
    else:
        model = open_model(arguments.model, kind)
        if arguments.merge is not None:
            model = _merged(model, arguments.merge)
        export_model(model, arguments.out, dtype=arguments.dtype, limit=int(arguments.shard * 1e9))
    print(f"{kind}: {arguments.out}")


def _kind(folder: Path) -> str:
    path = folder / "model.json"
    if path.is_file():
        return str(json.loads(path.read_text())["kind"])
    names = read_config(folder).get("architectures") or [""]
    return "critic" if str(names[0]).endswith("ForSequenceClassification") else "actor"


def _merged(model: Model, folder: Path) -> Model:
    source = local_files(folder)
    found = read_adapters(source.folder, model.config)
    weights, about = merge(model.weights, found.adapters, found.lora), {**model.about, "merged": source.name}
    if found.head is None:
        return dataclasses.replace(model, weights=weights, about=about)
    config = dataclasses.replace(model.config, tied=True)  # a critic has no unembedding
    critic = Critic(dataclasses.replace(weights, unembed=None), found.head)
    return Model("critic", config, model.tokenizer, critic, about)


def main() -> None:
    with exit_on_input_error(), preemptible():
        run(tyro.cli(Arguments))


if __name__ == "__main__":
    main()
