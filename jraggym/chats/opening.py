"""From what a configuration names to what runs: chat models, and the critic that scores their candidates.

    chat   = open_chat(Server("gpt-4o-mini", key_variable="OPENAI_API_KEY"))     an actor behind a server
    scorer = open_scorer(Local("runs/critic/model"))                             our critic, here
    [reply] = chat([request])
    [scores] = scorer([(request.messages, tuple(c.text for c in reply.completions))])

That is the transfer experiment of RAG-Gym: a critic of a small model's candidates picks among a large one's.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from jraggym.chat_model import ChatModel
from jraggym.chats.connection import Server
from jraggym.chats.critic import CriticScorer
from jraggym.chats.endpoint import Endpoint
from jraggym.chats.local import Local, LocalChat
from jraggym.porting.pretrained import open_model

ChatSpec = Server | Local

# what changes how fast a chat model answers, and not what
PACE = (
    *("cache", "key_variable", "concurrency", "requests_per_minute", "tokens_per_minute"),
    *("timeout", "attempts", "backoff", "patience", "rows"),
)


def settings_of(spec: ChatSpec) -> dict[str, Any]:
    """The settings that decide what a chat model answers, as JSON values."""
    return {name: value for name, value in dataclasses.asdict(spec).items() if name not in PACE}


def open_chat(spec: ChatSpec, cache: Path | None = None) -> ChatModel:
    """The chat model of a server or of a model on this machine; raises InputError where there is none.

    A server's answers are kept in the file `cache`, unless its own settings name another.
    """
    if isinstance(spec, Server):
        return Endpoint(dataclasses.replace(spec, cache=spec.cache or cache))
    model = open_model(spec.model, "actor")
    return LocalChat(model, max_prompt=spec.max_prompt, truncate=spec.truncate, rows=spec.rows)


def open_scorer(spec: Local) -> CriticScorer:
    """The critic of a model on this machine; raises InputError where there is none."""
    model = open_model(spec.model, "critic")
    return CriticScorer(model, max_prompt=spec.max_prompt, truncate=spec.truncate, rows=spec.rows)
