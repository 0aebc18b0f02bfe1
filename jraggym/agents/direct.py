"""Direct: the model answers at once, from what it knows."""

from __future__ import annotations

from jraggym.agents.agent import ANSWERS, Agent
from jraggym.agents.output import ANSWER, answer_of, read_output
from jraggym.agents.prompts import ANSWER_TEXT, chat, instruct
from jraggym.chat_model import Message
from jraggym.types import Action, State

SYSTEM = instruct("Answer the question straight away, without any explanation.", {}, {ANSWER: ANSWER_TEXT})


def prompt(state: State, last: bool) -> tuple[Message, ...]:
    """The question and nothing else."""
    return chat(SYSTEM, state)


def parse(output: str, state: State, last: bool) -> Action:
    """An answer."""
    return answer_of(read_output(output, sections=()))


DIRECT = Agent("direct", frozenset({ANSWERS}), prompt, parse)
