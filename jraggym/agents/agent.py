"""What an agent is: two pure functions, from a state to a prompt and from a model's output to an action.

An agent has no weights and keeps nothing: any chat model can play any agent, and everything that an agent knows is in
the state. So one and the same prompt is shown to the actor, the critic and the trainer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jraggym.chat_model import Message
from jraggym.types import Action, Search, State

# what agents are made of (RAG-Gym, table 1)
ANSWERS = "answer generation"
REASONS = "question reasoning"
RETRIEVES = "retrieval augmentation"
QUERIES = "query generation"
SUMMARISES = "document summarization"
REFLECTS = "reasoning reflection"
COMPONENTS = (ANSWERS, REASONS, RETRIEVES, QUERIES, SUMMARISES, REFLECTS)


@dataclass(frozen=True, slots=True)
class Agent:
    """How a chat model is asked for the next action.

    `prompt(state, last)` gives the chat to complete, or a `Search` that needs no model. `parse(output, state, last)`
    reads what the model wrote, and never raises. `last` says that this is the last turn, on which nothing is searched.
    """

    name: str
    components: frozenset[str]
    prompt: Callable[[State, bool], tuple[Message, ...] | Search]
    parse: Callable[[str, State, bool], Action]

    @property
    def digests(self) -> bool:
        """True where the agent reads a digest of the documents instead of the documents."""
        return SUMMARISES in self.components
