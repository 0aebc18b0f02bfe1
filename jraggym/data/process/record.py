"""One unit of process data: a state with its K sampled, labelled candidates (RAG-Gym 2.2)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jraggym import __version__
from jraggym.chat_model import Message
from jraggym.errors import InputError
from jraggym.types import Candidate, State, candidate_from_json, state_from_json, to_json


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where a record comes from: the names of the models and of the retriever, and the sampling seed."""

    actor: str
    judge: str
    retriever: str
    seed: int
    version: str = __version__  # of jraggym


@dataclass(frozen=True, slots=True)
class ProcessRecord:
    """One state of one episode; it needs no other file to be understood or trained on.

    Raises:
        InputError: `chosen` names no candidate, or a number is not finite (an unlabelled reward is None).
    """

    example_id: str
    step: int  # 0 is the episode's first state
    state: State
    prompt: str  # the state as the actor saw it; a chat as its messages in JSON, see `messages_text`
    golds: tuple[str, ...]
    candidates: tuple[Candidate, ...]
    chosen: int  # index of the executed candidate
    em: float  # exact match of the finished episode, 0 or 1
    f1: float  # token F1 of the finished episode, 0 to 1
    provenance: Provenance

    def __post_init__(self) -> None:
        if not 0 <= self.chosen < len(self.candidates):
            raise InputError(
                f"record {self.id!r} has no chosen candidate",
                got=f"{self.chosen} of {len(self.candidates)}",
                remedy="Give the index of the executed candidate.",
            )
        numbers = {"em": self.em, "f1": self.f1}
        for i, candidate in enumerate(self.candidates):
            for name in ("reward", "score", "logprob"):
                numbers[f"{name} of candidate {i}"] = getattr(candidate, name)
        for name, number in numbers.items():
            if number is not None and not math.isfinite(number):
                raise InputError(
                    f"{name} of record {self.id!r} is not finite", got=number, remedy="Unlabelled is None."
                )

    @property
    def id(self) -> str:
        """Example id and step, unique in a dataset: "q17/2"."""
        return f"{self.example_id}/{self.step}"

    @property
    def question(self) -> str:
        return self.state.question

    @property
    def messages(self) -> tuple[Message, ...] | None:
        """The chat that the candidates complete; None where they are actions in tags (see text/actions.py)."""
        if not self.prompt.startswith(_CHAT):
            return None
        return tuple(Message(**message) for message in json.loads(self.prompt))


_CHAT = '[{"role": '  # how a chat begins, and no prompt in tags


def messages_text(messages: Sequence[Message]) -> str:
    """A chat as the `prompt` of a record."""
    return json.dumps([{"role": m.role, "content": m.content} for m in messages], ensure_ascii=False)


def record_from_json(value: Mapping[str, Any]) -> ProcessRecord:
    """Reads what `types.to_json` made of a record; raises InputError on another shape."""
    try:
        fields = {
            **value,
            "state": state_from_json(value["state"]),
            "golds": tuple(value["golds"]),
            "candidates": tuple(candidate_from_json(item) for item in value["candidates"]),
            "provenance": Provenance(**value["provenance"]),
        }
        return ProcessRecord(**fields)
    except (KeyError, TypeError) as error:
        raise InputError("a process record of another shape", got=error, remedy="Collect it again.") from error


def encode(record: ProcessRecord) -> bytes:
    """One JSON line, without its newline; equal records have equal lines. Raises InputError for unwritable text."""
    try:
        return json.dumps(to_json(record), ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"record {record.id!r} holds text that is no Unicode", got=error, remedy="Drop lone surrogates from it."
        ) from error


def decode(line: bytes) -> ProcessRecord:
    """Reads a line of `encode`."""
    return record_from_json(json.loads(line))
