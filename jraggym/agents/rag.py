"""RAG (arXiv 2005.11401): one search with the question itself, then an answer from its documents."""

from __future__ import annotations

from jraggym.agents.agent import ANSWERS, REASONS, RETRIEVES, Agent
from jraggym.agents.output import ANSWER, REASONING, answer_of, read_output
from jraggym.agents.prompts import ANSWER_TEXT, DOCUMENTS, chat, documents_text, instruct, searches
from jraggym.chat_model import Message
from jraggym.types import Action, Search, State

SYSTEM = instruct(
    "Answer the question with the help of the documents below it. They were retrieved automatically: some may have "
    "nothing to do with the question. Reason first, and let the answer follow from your reasoning.",
    {REASONING: "what the documents say that bears on the question, and what follows from it, step after step"},
    {ANSWER: ANSWER_TEXT},
)


def prompt(state: State, last: bool) -> tuple[Message, ...] | Search:
    """First the search, which needs no model; then the question with the documents of the latest search."""
    found = searches(state)
    if not found and not last:
        return Search(state.question)
    return chat(SYSTEM, state, (DOCUMENTS, documents_text(found[-1][1].documents if found else ())))


def parse(output: str, state: State, last: bool) -> Action:
    """An answer, with the reasoning as its thought."""
    return answer_of(read_output(output))


RAG = Agent("rag", frozenset({ANSWERS, REASONS, RETRIEVES}), prompt, parse)
