"""ReAct (arXiv 2210.03629): the model reasons, then either searches or answers; it reads the documents themselves."""

from __future__ import annotations

from jraggym.agents.agent import ANSWERS, QUERIES, REASONS, RETRIEVES, Agent
from jraggym.agents.output import ANSWER, QUERY, REASONING, query_or_answer, read_output
from jraggym.agents.prompts import ANSWER_TEXT, HISTORY, LAST, chat, history_text, instruct
from jraggym.chat_model import Message
from jraggym.types import Action, State

TASK = (
    "You answer a question by searching a collection of documents, as often as it takes. In each turn you take one "
    "action: you search for what is still missing, or you give the answer once what you have found is enough for it. "
    "Ask for one thing at a time, and never repeat a query that has been tried."
)
QUERY_TEXT = "what to search for next"
SYSTEM = instruct(
    TASK,
    {REASONING: "what the searches so far have shown, what is still missing, and which action follows from that"},
    {QUERY: QUERY_TEXT},
    {ANSWER: ANSWER_TEXT},
)
FINISH = instruct(
    "You answer a question from what your searches in a collection of documents have found. No search is left: give "
    "the best answer that you can.",
    {REASONING: "what the searches have shown, and what follows from it"},
    {ANSWER: ANSWER_TEXT},
)


def prompt_with(digests: bool, state: State, last: bool) -> tuple[Message, ...]:
    """The question and all searches so far; on the last turn nothing but an answer is asked for."""
    parts = [(HISTORY, history_text(state, digests))]
    if last:
        parts.append((LAST, "Answer now."))
    return chat(FINISH if last else SYSTEM, state, *parts)


def prompt(state: State, last: bool) -> tuple[Message, ...]:
    """The question and all searches so far, with their documents."""
    return prompt_with(False, state, last)


def parse(output: str, state: State, last: bool) -> Action:
    """A search or an answer, never both, with the reasoning as its thought; on the last turn an answer."""
    return query_or_answer(read_output(output, keys=(QUERY, ANSWER)), last)


REACT = Agent("react", frozenset({ANSWERS, REASONS, RETRIEVES, QUERIES}), prompt, parse)
