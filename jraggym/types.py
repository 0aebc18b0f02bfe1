"""The text world: frozen records of strings, tuples and floats, with JSON in and out.

Nothing here imports jax. An `Example` holds the gold answer; a `State` never does, so no renderer,
policy or retriever that is handed a state can leak it.

    Example ── reset ──> State ── Action ──> State ── ... ──> State (done)
                           │ K candidates
                           └── Step(state, candidates, chosen) ... Trajectory(example_id, steps)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from types import NoneType
from typing import Any

from jraggym.errors import InputError


@dataclass(frozen=True, slots=True)
class Document:
    """One retrievable paragraph."""

    id: str
    title: str
    text: str


@dataclass(frozen=True, slots=True)
class Search:
    """Ask the retriever. The thought before it is kept for the transcript; it does not make another action.

    Nor does `so_far`, the answer as it stands, which some agents give with each search.
    """

    query: str
    thought: str = dataclasses.field(default="", compare=False)
    so_far: str | None = dataclasses.field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Answer:
    """End the episode with a prediction."""

    text: str
    thought: str = dataclasses.field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class Malformed:
    """A model output that is no action. It is data: counted, shown, and never executed."""

    reason: str


Action = Search | Answer | Malformed


class Segment(IntEnum):
    """Who wrote a token of an episode that is one growing text."""

    PAD = 0
    PROMPT = 1
    MODEL = 2  # drawn by the policy, its end token included: all that an objective may learn from
    OBSERVATION = 3  # what a search brought, tags around it included
    INVALID = 4  # what the environment says to an action that is none
    FORCED = 5  # what the environment says before the last turn


Piece = tuple[Segment, str]  # the text of tokens in a row that have one segment and one turn


@dataclass(frozen=True, slots=True)
class Turn:
    """One executed non-final action and what came back; `error` says why nothing did.

    `digest` is what a summariser made of the documents, for the agents that read digests instead.
    """

    action: Search | Malformed
    documents: tuple[Document, ...] = ()
    error: str | None = None
    digest: str | None = None


@dataclass(frozen=True, slots=True)
class State:
    """What the agent knows: the question and the turns so far (RAG-Gym 2.1: s_t = (Q, H_t)).

    `answer` is set by the terminal action, and `thought` holds the thought before it. `truncated` says that the
    turn budget ended first; the answer so far, where the agent has given one, is then the answer.
    """

    question: str
    turns: tuple[Turn, ...] = ()
    answer: str | None = None
    truncated: bool = False
    thought: str = ""

    @property
    def done(self) -> bool:
        return self.answer is not None or self.truncated

    @property
    def failed(self) -> bool:
        """True when the retriever failed in some turn; such an episode is counted, never hidden."""
        return any(turn.error is not None for turn in self.turns)


@dataclass(frozen=True, slots=True)
class Example:
    """One question with its gold `answers` (any of them counts) and gold document ids.

    A multiple-choice question has `options`, pairs of a letter and its text; its first answer is the right letter.
    """

    id: str
    question: str
    answers: tuple[str, ...]
    kind: str = ""
    support: tuple[str, ...] = ()
    options: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        if not self.question.strip():
            raise InputError(f"example {self.id!r} has no question", got=repr(self.question), remedy="Give it a text.")
        if not self.answers:
            raise InputError(f"example {self.id!r} has no gold answer", got="()", remedy="Give at least one answer.")
        letters = [letter for letter, _ in self.options]
        if len(set(letters)) < len(letters) or (letters and self.answers[0] not in letters):
            what = f"the first answer of example {self.id!r} must be the letter of one of its options"
            got = f"{self.answers[0]!r} and options {', '.join(letters)}"
            raise InputError(what, got=got, remedy="Give each option a letter of its own.")


@dataclass(frozen=True, slots=True)
class Candidate:
    """One of the K sampled actions at a state."""

    text: str
    reward: float | None = None  # process reward; None = unlabelled, never 0 by accident
    score: float | None = None  # critic score
    logprob: float | None = None  # sum of the policy's log-probabilities, in nats
    documents: tuple[str, ...] = ()  # ids that this candidate's search retrieves
    tokens: tuple[int, ...] = ()  # as sampled, the end token included; () where nothing was sampled
    logprobs: tuple[float, ...] = ()  # the policy's log-probability of each token, in nats


@dataclass(frozen=True, slots=True)
class Step:
    """A state, the candidates proposed there and the index of the executed one."""

    state: State
    candidates: tuple[Candidate, ...]
    chosen: int


@dataclass(frozen=True, slots=True)
class Trajectory:
    """A whole episode."""

    example_id: str
    steps: tuple[Step, ...]
    final: State


_ACTIONS: dict[str, type[Search] | type[Answer] | type[Malformed]] = {
    "search": Search,
    "answer": Answer,
    "malformed": Malformed,
}


def to_json(record: Any) -> Any:
    """Turns a record of this module into plain JSON values."""
    if isinstance(record, Search | Answer | Malformed):
        name = next(name for name, cls in _ACTIONS.items() if isinstance(record, cls))
        return {"type": name, **{f.name: getattr(record, f.name) for f in dataclasses.fields(record)}}
    if dataclasses.is_dataclass(record):
        return {f.name: to_json(getattr(record, f.name)) for f in dataclasses.fields(record)}
    if isinstance(record, tuple | list):
        return [to_json(item) for item in record]
    return record


# what JSON may hold in a field, by its annotation; true and false are no numbers
_PLAIN: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "str | None": (str, NoneType),
    "int": (int,),
    "float": (int, float),
    "float | None": (int, float, NoneType),
    "bool": (bool,),
}


def _take(cls: type, value: Any, **convert: Any) -> Any:
    """Builds `cls` from a JSON object, refusing unknown, missing and wrongly typed fields by name.

    `convert` reads the fields that hold records; for a tuple, each of its items.
    """
    if not isinstance(value, Mapping):
        raise InputError(f"a {cls.__name__} must be a JSON object", got=type(value).__name__, remedy="Check the file.")
    known = {f.name: f for f in dataclasses.fields(cls)}
    if unknown := sorted(set(value) - set(known)):
        raise InputError(
            f"unknown field in {cls.__name__}", got=", ".join(unknown), remedy=f"Known fields: {', '.join(known)}."
        )
    required = [n for n, f in known.items() if f.default is dataclasses.MISSING]
    if missing := [name for name in required if name not in value]:
        raise InputError(f"missing field in {cls.__name__}", got=", ".join(missing), remedy="Add it.")
    return cls(**{n: _field(f"{cls.__name__}.{n}", str(known[n].type), v, convert.get(n)) for n, v in value.items()})


def _field(name: str, annotation: str, value: Any, convert: Any) -> Any:
    if annotation.endswith(", ...]"):
        if not isinstance(value, list | tuple):
            raise InputError(f"{name} must be a list", got=type(value).__name__, remedy="Write a JSON array.")
        item = annotation.removeprefix("tuple[").removesuffix(", ...]")
        return tuple(_field(name, item, v, convert) for v in value)
    if convert is not None:
        return convert(value)
    allowed = _PLAIN[annotation]
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
        raise InputError(f"{name} must be {annotation}", got=type(value).__name__, remedy="Check the file.")
    return value


def document_from_json(value: Any) -> Document:
    return _take(Document, value)


def action_from_json(value: Any) -> Action:
    kind = value.get("type") if isinstance(value, Mapping) else None
    if not isinstance(kind, str) or kind not in _ACTIONS:
        raise InputError("unknown action type", got=repr(kind), remedy=f"Use one of {', '.join(_ACTIONS)}.")
    return _take(_ACTIONS[kind], {k: v for k, v in value.items() if k != "type"})


def turn_from_json(value: Any) -> Turn:
    turn = _take(Turn, value, action=action_from_json, documents=document_from_json)
    if isinstance(turn.action, Answer):
        raise InputError("an answer is no turn", got=repr(turn.action), remedy="Write it as the state's answer.")
    return turn


def state_from_json(value: Any) -> State:
    return _take(State, value, turns=turn_from_json)


def example_from_json(value: Any) -> Example:
    return _take(Example, value, options=_option)


def _option(value: Any) -> tuple[str, str]:
    if not isinstance(value, list | tuple) or [type(part) for part in value] != [str, str]:
        raise InputError("an option must be a letter and a text", got=repr(value)[:80], remedy="Check the file.")
    return value[0], value[1]


def candidate_from_json(value: Any) -> Candidate:
    return _take(Candidate, value)


def step_from_json(value: Any) -> Step:
    return _take(Step, value, state=state_from_json, candidates=candidate_from_json)


def trajectory_from_json(value: Any) -> Trajectory:
    return _take(Trajectory, value, steps=step_from_json, final=state_from_json)
