"""The settings of a sentence-transformers folder, read into a `Family` and written from one.

    modules.json                        Transformer, Pooling and perhaps Normalize; anything else is refused by name
    1_Pooling/config.json               mean or cls
    sentence_bert_config.json           the most tokens of a text
    config_sentence_transformers.json   prompts of queries and documents, similarity, and under "jraggym" what the
                                        library has no field for

What a folder says wins over the family that the user names. An empty prompt says nothing: the library writes those by
itself. Both layouts are read, that of the library's versions 2 to 5 and that of 6; the first is written.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, get_args

from jraggym import __version__
from jraggym.errors import InputError
from jraggym.models.bert import read_json, require, take
from jraggym.models.encoders import FAMILIES, DocumentForm, Family, Similarity

_LEGACY = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
_OURS = ("document_form", "query_tokens", "towers")
_CONFIG = "config_sentence_transformers.json"


def read_family(folder: Path, named: Family | None) -> Family:
    """What a folder says of its encoder, and for the rest what the family says that the user named.

    Raises:
      InputError: for a setting that is not supported, a broken file, or when neither tells how vectors are made.
    """
    if not (folder / "modules.json").is_file():
        if named is None:
            remedy = f"Name its family: {', '.join(FAMILIES)}."
            raise InputError(f"{folder} does not say how its vectors are made", got="no modules.json", remedy=remedy)
        return named
    family = named or Family()
    pooling, normalised = _modules(folder)
    settings = read_json(folder / _CONFIG) if (folder / _CONFIG).is_file() else {}
    require(folder / _CONFIG, settings, {"default_prompt_name": None})
    prompts = settings.get("prompts") or {}
    document = next((prompts[name] for name in ("document", "passage", "corpus") if prompts.get(name)), None)
    ours = (
        dict(zip(_OURS, take(folder / _CONFIG, settings["jraggym"], *_OURS), strict=True))
        if "jraggym" in settings
        else {}
    )
    limit = _limit(folder)
    family = dataclasses.replace(
        family,
        pooling=pooling,
        similarity=_similarity(folder, settings, normalised, named),
        query_prefix=prompts.get("query") or family.query_prefix,
        document_prefix=document or family.document_prefix,
        document_tokens=family.document_tokens if limit is None else limit,
        **ours,
    )
    if family.document_form not in get_args(DocumentForm):
        remedy = f"Use one of {', '.join(get_args(DocumentForm))}."
        raise InputError(f"{folder / _CONFIG}: unknown document_form", got=repr(family.document_form), remedy=remedy)
    return family


def _modules(folder: Path) -> tuple[Any, bool]:
    """The pooling, and whether vectors are scaled to unit length."""
    path, kinds, pooling = folder / "modules.json", [], None
    for module in read_json(path):
        kind, place = take(path, module, "type", "path")
        kinds.append(kind.rpartition(".")[2])
        if kinds[-1] not in ("Transformer", "Pooling", "Normalize"):
            remedy = "Use a model of Transformer, Pooling and Normalize."
            raise InputError(f"{path}: this module is not supported", got=kind, remedy=remedy)
        if kinds[-1] == "Transformer":
            require(path, {"path": place}, {"path": ""})
        if kinds[-1] == "Pooling":
            pooling = _pooling(folder / place / "config.json")
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        remedy = "Use a model of Transformer, Pooling and perhaps Normalize, in this order."
        raise InputError(f"{path}: these modules are not supported", got=", ".join(kinds), remedy=remedy)
    return pooling, len(kinds) == 3


def _pooling(path: Path) -> str:
    settings = read_json(path)
    require(path, settings, {"include_prompt": True})
    if "pooling_mode" in settings:
        mode = settings["pooling_mode"]
    else:
        modes = [name for name, on in settings.items() if name.startswith("pooling_mode_") and on]
        mode = _LEGACY.get(modes[0], modes[0]) if len(modes) == 1 else ", ".join(modes) or "none"
    if mode not in _LEGACY.values():
        raise InputError(f"{path}: this pooling is not supported", got=mode, remedy="Use a model with mean or cls.")
    return mode


def _limit(folder: Path) -> int | None:
    """The most tokens of a text; None where the folder sets no limit."""
    path = folder / "sentence_bert_config.json"
    settings = read_json(path)
    require(path, settings, {"transformer_task": "feature-extraction"})
    if settings.get("do_lower_case"):  # harmless where the tokenizer does it anyway
        normalizer = read_json(folder / "tokenizer.json").get("normalizer") or {}
        require(path, settings, {"do_lower_case": bool(normalizer.get("lowercase"))})
    if "max_seq_length" not in settings and (folder / "tokenizer_config.json").is_file():
        path, name = folder / "tokenizer_config.json", "model_max_length"  # where version 6 keeps it
        return take(path, read_json(path), name)[0]
    return take(path, settings, "max_seq_length")[0]


def _similarity(folder: Path, settings: dict[str, Any], normalised: bool, named: Family | None) -> Any:
    """Vectors of unit length rank alike by all three similarities, so that normalised ones are "cosine"."""
    said = settings.get("similarity_fn_name")
    if said is not None and said not in get_args(Similarity):
        remedy = f"Use a model with {', '.join(get_args(Similarity))}."
        raise InputError(f"{folder / _CONFIG}: this similarity_fn_name is not supported", got=repr(said), remedy=remedy)
    if normalised:
        return "cosine"
    if said is None and named is None:
        remedy = f"Name its family: {', '.join(FAMILIES)}."
        raise InputError(f"{folder} does not say how its vectors compare", got="no similarity_fn_name", remedy=remedy)
    return said or (named.similarity if named else None)


def write_settings(folder: Path, family: Family, dim: int, max_tokens: int) -> None:
    """Writes what `read_family` reads back, as the published all-MiniLM-L6-v2 has it."""
    kinds = ["Transformer", "Pooling"] + ["Normalize"] * (family.similarity == "cosine")
    paths = ["", *(f"{i}_{kind}" for i, kind in enumerate(kinds) if i)]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(zip(kinds, paths, strict=True))
    ]
    pooling = {name: mode == family.pooling for name, mode in _LEGACY.items()}
    ours = {name: getattr(family, name) for name in _OURS}
    files: dict[str, Any] = {
        "modules.json": modules,
        "1_Pooling/config.json": {"word_embedding_dimension": dim, **pooling},
        "sentence_bert_config.json": {"max_seq_length": max_tokens, "do_lower_case": False},
        _CONFIG: {
            "prompts": {"query": family.query_prefix, "document": family.document_prefix},
            "default_prompt_name": None,
            "similarity_fn_name": family.similarity,
            "jraggym": {"version": __version__, **ours},
        },
    }
    for path in paths[1:]:
        (folder / path).mkdir()
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value, indent=2) + "\n")
