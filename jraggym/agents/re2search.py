"""Re2Search (RAG-Gym, 2.2.1): reason to an answer, reflect on what in it is unverified, and search for that.

Each turn gives an answer so far. It is final when no claim behind it is unverified, or when the budget ends.
"""

from __future__ import annotations

from jraggym.agents.agent import COMPONENTS, Agent
from jraggym.agents.output import ANSWER, CLAIMS, QUERY, REASONING, answer_of, read_output
from jraggym.agents.prompts import ANSWER_TEXT, HISTORY, chat, history_text, instruct
from jraggym.chat_model import Message
from jraggym.types import Action, Malformed, Search, State

SYSTEM = instruct(
    "You answer a question, and by searching a collection of documents you make sure that each claim behind your "
    "answer is true. In each turn you work out the best answer that you can give, look for claims behind it that the "
    "searches so far do not support, and ask for the first of these. You are finished when there are none.",
    {
        REASONING: "what the searches so far have shown, and how an answer follows; say what you take for granted",
        CLAIMS: "the claims above that no search supports, and the one to check first; or that all are supported",
    },
    {ANSWER: ANSWER_TEXT + ", as far as you can tell now", QUERY: "one simple query for that claim, or null if none"},
)


def prompt(state: State, last: bool) -> tuple[Message, ...]:
    """The question and all searches so far, with the digests of their documents; the same on every turn."""
    return chat(SYSTEM, state, (HISTORY, history_text(state, digests=True)))


def parse(output: str, state: State, last: bool) -> Action:
    """A search that carries the answer so far, or without a query (and on the last turn) that answer."""
    read = read_output(output, (REASONING, CLAIMS), (ANSWER, QUERY))
    if isinstance(read, Malformed) or read.query is None or last:
        return answer_of(read)
    return Search(read.query, read.thought, read.answer)


RE2SEARCH = Agent("re2search", frozenset(COMPONENTS), prompt, parse)
