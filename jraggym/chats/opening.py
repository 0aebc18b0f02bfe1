"""From what a configuration names to what runs: chat models, and the critic that scores their candidates.

    chat   = open_chat(Server("gpt-4o-mini", key_variable="OPENAI_API_KEY"))     an actor behind a server
    scorer = open_scorer(Local("runs/critic/model"))                             our critic, here
    [reply] = chat([request])
    [scores] = scorer([(request.messages, tuple(c.text for c in reply.completions))])

That is the transfer experiment of RAG-Gym: a critic of a small model's candidates picks among a large one's.
"""

from __future__ import annotations

from jraggym.chat_model import ChatModel
from jraggym.chats.connection import Server
from jraggym.chats.critic import CriticScorer
from jraggym.chats.endpoint import Endpoint
from jraggym.chats.local import Local, LocalChat
from jraggym.porting.pretrained import open_model

ChatSpec = Server | Local


def open_chat(spec: ChatSpec) -> ChatModel:
    """The chat model of a server or of a model on this machine; raises InputError where there is none."""
    if isinstance(spec, Server):
        return Endpoint(spec)
    model = open_model(spec.model, "actor")
    return LocalChat(model, max_prompt=spec.max_prompt, truncate=spec.truncate, rows=spec.rows)


def open_scorer(spec: Local) -> CriticScorer:
    """The critic of a model on this machine; raises InputError where there is none."""
    model = open_model(spec.model, "critic")
    return CriticScorer(model, max_prompt=spec.max_prompt, truncate=spec.truncate, rows=spec.rows)
