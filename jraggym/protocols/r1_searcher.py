"""R1-Searcher (arXiv 2503.05592): one long thought with searches inside, then the answer.

The tags of the thought are no pair of the protocol, since searches break it up: its rewards count them.
"""

from __future__ import annotations

from jraggym.chat_model import Message
from jraggym.protocols.protocol import Protocol

R1_SEARCHER = Protocol(
    name="r1_searcher",
    prompt=(
        Message(
            "system",
            "You reason about the user's question at length, and then give a short answer: <think> your reasoning "
            "</think> <answer> the answer </answer>. While you reason, you can have something looked up by writing "
            "<|begin_of_query|> key words <|end_of_query|>; what is found follows between <|begin_of_documents|> and "
            "<|end_of_documents|>. Look up one simple thing at a time.",
        ),
        Message("user", "{question}"),
    ),
    closed_prompt=(
        Message(
            "system",
            "You reason about the user's question at length, and then give a short answer: <think> your reasoning "
            "</think> <answer> the answer </answer>.",
        ),
        Message("user", "{question}"),
    ),
    stops=("<|end_of_query|>", "</answer>"),
    extract=("answer",),
    sequence="x?(?:SOx?)*A",
    search=("<|begin_of_query|>", "<|end_of_query|>"),
    answer=("<answer>", "</answer>"),
    result=("<|begin_of_documents|>", "<|end_of_documents|>"),
    marks=("<think>", "</think>"),
    observation="\n\n<|begin_of_documents|>\n{found}<|end_of_documents|>\n\n",
    document="({rank}){title} {text}",
)
