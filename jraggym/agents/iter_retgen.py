"""Iter-RetGen (arXiv 2305.15294): RAG again and again, each time with all that it wrote before as part of the query.

The query is the question and then the whole previous generation, and new documents replace the old ones. There are as
many rounds as the budget allows: with two turns this is RAG.
"""

from __future__ import annotations

from jraggym.agents.agent import Agent
from jraggym.agents.rag import RAG
from jraggym.text.actions import MAX_CHARS, text_fault
from jraggym.types import Action, Answer, Malformed, Search, State


def parse(output: str, state: State, last: bool) -> Action:
    """A search with the question and this generation, on the last turn its answer."""
    action = RAG.parse(output, state, last)
    if last or not isinstance(action, Answer):
        return action
    query = " ".join(f"{state.question} {action.thought} {action.text}".split())[:MAX_CHARS]
    return Malformed(fault) if (fault := text_fault(query)) else Search(query, action.thought, action.text)


ITER_RETGEN = Agent("iter_retgen", RAG.components, RAG.prompt, parse)
