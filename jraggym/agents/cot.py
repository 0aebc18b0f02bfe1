"""Chain of thought (arXiv 2201.11903): the model reasons, then answers, from what it knows."""

from __future__ import annotations

from jraggym.agents.agent import ANSWERS, REASONS, Agent
from jraggym.agents.output import ANSWER, REASONING, answer_of, read_output
from jraggym.agents.prompts import ANSWER_TEXT, chat, instruct
from jraggym.chat_model import Message
from jraggym.types import Action, State

SYSTEM = instruct(
    "Answer the question. Reason first, and let the answer follow from your reasoning.",
    {REASONING: "what you know that bears on the question, and what follows from it, one step after the other"},
    {ANSWER: ANSWER_TEXT},
)


def prompt(state: State, last: bool) -> tuple[Message, ...]:
    """The question and nothing else."""
    return chat(SYSTEM, state)


def parse(output: str, state: State, last: bool) -> Action:
    """An answer, with the reasoning as its thought."""
    return answer_of(read_output(output))


COT = Agent("cot", frozenset({ANSWERS, REASONS}), prompt, parse)
