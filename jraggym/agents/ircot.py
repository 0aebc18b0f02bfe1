"""IRCoT (arXiv 2212.10509): each sentence of a chain of thought is the next query.

The first query is the question. The chain ends with its answer; the published system has a separate reader answer from
the paragraphs, which would cost a call more than other agents have.
"""

from __future__ import annotations

from itertools import zip_longest

from jraggym.agents.agent import ANSWERS, QUERIES, REASONS, RETRIEVES, Agent
from jraggym.agents.output import ANSWER, REASONING, answer_of, read_output
from jraggym.agents.prompts import ANSWER_TEXT, DOCUMENTS, LAST, chat, documents_text, instruct, one_line, searches
from jraggym.chat_model import Message
from jraggym.text.actions import text_fault
from jraggym.types import Action, Document, Malformed, Search, State

CHAIN = "Reasoning so far"
PARAGRAPHS = 15  # the most that the model is shown
SYSTEM = instruct(
    "You answer a question by a chain of reasoning, one sentence in each turn. Documents are retrieved for each "
    "sentence that you write and shown to you in the next turn. Go on from the reasoning so far with a new sentence, "
    "drawn from the documents. Give the answer with the sentence that reaches it, and null with every other.",
    {REASONING: "the next sentence, and only that one"},
    {ANSWER: None},
    {ANSWER: ANSWER_TEXT},
)


def prompt(state: State, last: bool) -> tuple[Message, ...] | Search:
    """First a search for the question, which needs no model; then all paragraphs and all sentences so far."""
    found = searches(state)
    if not found and not last:
        return Search(state.question)
    chain = "\n".join(one_line(search.query) for search, _ in found[1:]) or "(none)"
    parts = [(DOCUMENTS, documents_text(paragraphs(state))), (CHAIN, chain)]
    if last:
        parts.append((LAST, "Write the last sentence and the best answer that you can give."))
    return chat(SYSTEM, state, *parts)


def paragraphs(state: State) -> tuple[Document, ...]:
    """The first `PARAGRAPHS` distinct ones: the best of every search, then the second best, and so on."""
    ranked = zip_longest(*(turn.documents for _, turn in searches(state)))
    distinct = dict.fromkeys(document for rank in ranked for document in rank if document is not None)
    return tuple(distinct)[:PARAGRAPHS]


def parse(output: str, state: State, last: bool) -> Action:
    """A search for the sentence, or the answer that came with it."""
    read = read_output(output)
    if isinstance(read, Malformed) or read.answer is not None or last:
        return answer_of(read)
    sentence = " ".join(read.thought.split())
    return Malformed(f"the sentence: {fault}") if (fault := text_fault(sentence)) else Search(sentence)


IRCOT = Agent("ircot", frozenset({ANSWERS, REASONS, RETRIEVES, QUERIES}), prompt, parse)
