"""From the name of a model to a local folder: a folder as it is, or a pinned revision of a hub repository."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from jraggym.errors import InputError

# Weights, configurations and tokenizers; no code of the repository, and no weights in formats that execute code.
FILES = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.txt", "*.model")
LEFT = ("consolidated*", "original/*", "onnx/*", "openvino/*")  # the same weights once more
_NAME = re.compile(r"[\w.-]+/[\w.-]+@[\w./-]+")


@dataclass(frozen=True)
class Source:
    """A model's files, and where they come from."""

    folder: Path
    name: str  # the folder, or owner/repository@commit


def local_files(name: str | Path) -> Source:
    """The files of a folder, or of `owner/repository@revision` on the hub, downloaded once (huggingface_hub's cache).

    A revision is a commit, a tag or a branch, and the commit is kept in the name: without one, two runs of the same
    command could train different models. The token for a private repository comes from the environment (HF_TOKEN) or
    from `hf auth login`.

    Raises InputError when there is no such folder, no revision, or the hub cannot give it.
    """
    folder = Path(name)
    if folder.is_dir():
        return Source(folder, str(name))
    if not _NAME.fullmatch(str(name)):
        remedy = "Name a folder, or a hub repository with its revision: owner/repository@commit."
        raise InputError("no such model", got=str(name), remedy=remedy)
    repository, revision = str(name).split("@")
    try:
        found = snapshot_download(repository, revision=revision, allow_patterns=list(FILES), ignore_patterns=list(LEFT))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        remedy = "Look at the name, the revision, the network, and HF_TOKEN for a private repository."
        got = str(error).strip().partition("\n")[0]
        raise InputError(f"the hub does not give {name}", got=got, remedy=remedy) from error
    return Source(Path(found), f"{repository}@{Path(found).name}")
