"""Search-o1 (arXiv 2501.05366) as in RAG-Gym: ReAct that reads a digest of each search instead of its documents."""

from __future__ import annotations

import dataclasses

from jraggym.agents.agent import SUMMARISES
from jraggym.agents.react import REACT, prompt_with
from jraggym.chat_model import Message
from jraggym.types import State


def prompt(state: State, last: bool) -> tuple[Message, ...]:
    """The question and all searches so far, with the digests of their documents."""
    return prompt_with(True, state, last)


SEARCH_O1 = dataclasses.replace(REACT, name="search_o1", components=REACT.components | {SUMMARISES}, prompt=prompt)
