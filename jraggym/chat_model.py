"""What agents, summarisers and judges talk to: anything that completes chats, by one signature.

    Request(messages, candidates, ...) ──> ChatModel ──> Reply(completions, tokens, cost)

A chat model is called with many requests at once, and answers in their order. It never raises for a single request:
what went wrong with it stands in its reply's `error`, to be counted by the caller.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a chat; `role` is "system", "user" or "assistant"."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Request:
    """A chat to complete `candidates` times, each completion of at most `max_tokens` tokens.

    Temperature 0 is greedy. The completions depend on the request alone (`seed` included), not on its batch.
    """

    messages: tuple[Message, ...]
    candidates: int = 1
    temperature: float = 0.0
    max_tokens: int = 1_024
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Completion:
    """One completion; `cut` says that `max_tokens` ended it. `logprob` is the sum over its tokens, in nats."""

    text: str
    tokens: int = 0
    logprob: float | None = None
    cut: bool = False


@dataclass(frozen=True, slots=True)
class Reply:
    """The completions of a request, none of them where there is an `error`; `cost` in US dollars."""

    completions: tuple[Completion, ...] = ()
    prompt_tokens: int = 0
    cost: float = 0.0
    error: str | None = None


class ChatModel(Protocol):
    """Completes chats: one reply for each request, in their order."""

    def __call__(self, requests: Sequence[Request]) -> list[Reply]: ...
