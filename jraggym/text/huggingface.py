"""Tokenizers of Hugging Face models: their ids, their chat template, and the ids at which their turns end."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import sentencepiece
import transformers

from jraggym.errors import InputError
from jraggym.text.tokenizer import np_rows

# Llama's templates say today's date, unless they are told one; this is what they fall back to without a clock.
DATE = "26 Jul 2024"
PROBES = ("The birthplace of an author", "two  spaces ", "Łódź 日本")


class HuggingFaceTokenizer:
    """A tokenizer of `transformers`; special tokens are never added to a text, and shown where a model wrote them."""

    def __init__(self, tokenizer: Any, stops: Sequence[int] = (), options: Mapping[str, Any] | None = None):
        """`stops`: ids at which generation ends, else the tokenizer's own; `options`: what the chat template takes
        beside the messages (`enable_thinking` of Qwen3; `date_string` of Llama 3, which is DATE unless told)."""
        self._tokenizer, self._options = tokenizer, {"date_string": DATE, **(options or {})}
        own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self._stops = tuple(stops) or tuple(own)
        self._vocab: dict[str, int] = tokenizer.get_vocab()

    @classmethod
    def load(cls, folder: str | Path, **options: Any) -> HuggingFaceTokenizer:
        """Reads a folder (see porting/hub.py for the hub); no code that lies there is ever run.

        Raises InputError when files are missing or damaged, or when SentencePiece reads them otherwise.
        """
        name, folder = folder, Path(folder)
        try:
            kind = _kind(folder)
            found = kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            stops = _generation_stops(folder)
            empty = not found.encode(PROBES[0], add_special_tokens=False)  # transformers makes one of no files
        except Exception as error:  # `tokenizers` raises plain Exceptions
            remedy = "Give a folder with tokenizer.json, or with tokenizer.model and tokenizer_config.json."
            raise InputError(f"cannot read the tokenizer {name}", got=error, remedy=remedy) from error
        if empty:
            remedy = "Add tokenizer.json, or tokenizer.model."
            raise InputError(f"the tokenizer {name} has no vocabulary", got=f"{len(found)} tokens", remedy=remedy)
        if _pieces_only(folder):
            _refuse_misread(found, folder / "tokenizer.model")
        return cls(found, stops, options)

    def save(self, folder: str | Path) -> None:
        """Writes the tokenizer's files, its chat template, and generation_config.json with the ids that end a turn.

        `load` gives the same tokenizer from them, and AutoTokenizer the same ids.
        """
        copied = copy.deepcopy(self._tokenizer)
        copied.pad_token = copied.convert_ids_to_tokens(self.pad_id)
        copied.save_pretrained(folder)
        generation = {"eos_token_id": list(self._ends), "pad_token_id": self.pad_id}
        (Path(folder) / "generation_config.json").write_text(json.dumps(generation, indent=1))

    def fits(self, rows: int) -> bool:
        """Does an embedding table of so many rows hold all tokens but special ones? (Gemma 3 has some for images.)"""
        special = {self._vocab[token] for token in self._special}
        return all(i < rows or i in special for i in self._vocab.values())

    @property
    def vocab_size(self) -> int:
        """One more than the largest id; a model's own table is often padded beyond it."""
        return max(self._vocab.values()) + 1

    @property
    def pad_id(self) -> int:
        """The padding token, or another special one: never the id that ends an action.

        A classifier of transformers reads the last token that is not padding, and that is the end of the action.
        """
        of, end = self._tokenizer, self._ends[:1]
        known = (of.pad_token_id, of.unk_token_id, of.bos_token_id, *self._ends[1:])
        return next((i for i in known if i is not None and i not in end), 0)

    def token_id(self, piece: str) -> int:
        """The id of a token; KeyError when there is none."""
        return self._vocab[piece]

    def encode(self, segments: Sequence[str]) -> list[list[int]]:
        """Ids of each segment, without special tokens around it."""
        return self._tokenizer(list(segments), add_special_tokens=False)["input_ids"] if segments else []

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """Text of each id sequence; padding and ids outside the vocabulary are dropped."""
        size, pad = self.vocab_size, self._tokenizer.pad_token_id
        kept = [[int(i) for i in row if 0 <= i < size and i != pad] for row in np_rows(ids)]
        return [self._tokenizer.decode(row, clean_up_tokenization_spaces=False) for row in kept]

    def chat(self, messages: Sequence[Mapping[str, str]], generation: bool = True) -> list[int]:
        """The ids that `apply_chat_template` gives; with `generation` they end where the assistant begins to write.

        Raises InputError when there is no chat template, or when it refuses the messages.
        """
        if self._tokenizer.chat_template is None:
            remedy = "Use an instruction-tuned model, or add chat_template.jinja to its folder."
            raise InputError("the tokenizer has no chat template", got=self._tokenizer.name_or_path, remedy=remedy)
        try:
            return self._tokenizer.apply_chat_template(
                list(messages), tokenize=True, add_generation_prompt=generation, return_dict=False, **self._options
            )
        except Exception as error:  # a template is a program, and fails as it likes
            got = f"{type(error).__name__}: {error}, for the roles {', '.join(m['role'] for m in messages)}"
            raise InputError("the chat template refuses the messages", got=got, remedy="Use other roles.") from error

    @cached_property
    def has_system(self) -> bool:
        """Whether the chat template shows a system message; some families refuse one, and some leave it out."""
        user = {"role": "user", "content": "?"}
        try:
            return self.chat([{"role": "system", "content": "!"}, user]) != self.chat(
                [{"role": "system", "content": "."}, user]
            )
        except InputError:
            self.chat([user])  # a template that refuses this as well is at fault, not the role
            return False

    @cached_property
    def end_ids(self) -> tuple[int, ...]:
        """Ids that end an assistant's turn: first what a chat template writes there, then the model's stops.

        Raises InputError when there is none.
        """
        if not (ids := self._ends):
            remedy = "Add eos_token_id to generation_config.json."
            raise InputError("no token ends a turn", got=self._tokenizer.name_or_path, remedy=remedy)
        return ids

    @cached_property
    def _ends(self) -> tuple[int, ...]:
        closing = [] if self._tokenizer.chat_template is None else self._closing()
        return tuple(dict.fromkeys((*closing[:1], *self._stops)))

    def _closing(self) -> list[int]:
        """The special ids that the chat template writes behind an assistant's text."""
        said = [
            self.chat([{"role": "user", "content": "?"}, {"role": "assistant", "content": text}], generation=False)
            for text in ("yes", "no")
        ]
        after = 0  # ids at the end that do not depend on the text
        while after < min(map(len, said)) and len({ids[-1 - after] for ids in said}) == 1:
            after += 1
        special = {self._vocab[token] for token in self._special}
        return [i for i in said[0][len(said[0]) - after :] if i in special]

    def defuse(self, text: str) -> str:
        """Breaks up special tokens in text from outside with a space, so that it cannot end a turn by one.

        Halves of Unicode pairs, which no tokenizer reads, become question marks. Where a family marks its turns by
        plain text ("[INST]" of the first Mistrals), that text stays as it is.
        """
        text = text.encode("utf-8", "replace").decode()
        return self._special_pattern.sub(lambda match: f"{match.group()[0]} {match.group()[1:]}", text)

    @cached_property
    def _special(self) -> list[str]:
        added = [str(token) for token in self._tokenizer.added_tokens_decoder.values() if token.special]
        return list(dict.fromkeys((*self._tokenizer.all_special_tokens, *added)))

    @cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        longest_first = sorted((token for token in self._special if len(token) > 1), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def _pieces_only(folder: Path) -> bool:
    """Whether SentencePiece's own file is all there is."""
    return (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file()


def _kind(folder: Path) -> Any:
    """The class to load with. AutoTokenizer goes by the model's type, and for some (mistral) it takes one that reads
    tokenizer.model without the space that SentencePiece puts in front."""
    if not _pieces_only(folder):
        return transformers.AutoTokenizer
    named = _json(folder / "tokenizer_config.json").get("tokenizer_class", "").removesuffix("Fast")
    return getattr(transformers, named if named.endswith("Tokenizer") else "", transformers.LlamaTokenizer)


def _generation_stops(folder: Path) -> list[int]:
    """Ids of generation_config.json, which names one, several or none."""
    found = _json(folder / "generation_config.json").get("eos_token_id")
    return found if isinstance(found, list) else [] if found is None else [found]


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _refuse_misread(found: Any, path: Path) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    for probe in PROBES:
        ours, theirs = found.encode(probe, add_special_tokens=False), processor.encode(probe)
        if ours != theirs:
            remedy = "Name the right tokenizer_class in tokenizer_config.json, or add tokenizer.json."
            raise InputError(f"transformers misreads {path}", got=f"{ours} for {theirs} of {probe!r}", remedy=remedy)
