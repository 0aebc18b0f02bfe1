"""Search-R1 (arXiv 2503.09516): thoughts, searches and what they bring in one text, and a second chance."""

from __future__ import annotations

from jraggym.chat_model import Message
from jraggym.protocols.protocol import Protocol

SEARCH_R1 = Protocol(
    name="search_r1",
    prompt=(
        Message(
            "user",
            "Answer the question below. Think before you act: your thoughts belong between <think> and </think>, at "
            "the start and whenever something new has come in. Where a fact is missing, ask for it with <search> a "
            "query </search>; what a search engine finds is then put between <information> and </information>. Search "
            "as often as it takes. As soon as nothing is missing, end with the answer in as few words as possible and "
            "without reasons, as in <answer> Lisbon </answer>.\n\nQuestion: {question}",
        ),
    ),
    closed_prompt=(
        Message(
            "user",
            "Answer the question below from what you know. First write your thoughts between <think> and </think>, "
            "then end with the answer in as few words as possible and without reasons, as in "
            "<answer> Lisbon </answer>.\n\nQuestion: {question}",
        ),
    ),
    stops=("</search>", "</answer>"),
    extract=("answer",),
    sequence="T(SOT)*A",
    search=("<search>", "</search>"),
    answer=("<answer>", "</answer>"),
    think=("<think>", "</think>"),
    result=("<information>", "</information>"),
    observation="\n\n<information>{found}</information>\n\n",
    document="Doc {rank}(Title: {title}) {text}",
    invalid=(
        "\nThat was not an action that can be carried out. To search, I write <search> a query </search>; to finish, I "
        "write <answer> the answer </answer>. Now I do one of the two.\n"
    ),
)
