r"""ReSearch (arXiv 2503.19470): searches inside the chain of thought, and a final answer in \boxed{}.

An action that is none ends the episode, and so does the end token, without which an episode has no reward.
"""

from __future__ import annotations

from jraggym.chat_model import Message
from jraggym.protocols.protocol import Protocol

RESEARCH_RL = Protocol(
    name="research_rl",
    prompt=(
        Message(
            "system",
            "You solve a question step by step, with a search engine at hand. Your reasoning stands between <think> "
            "and </think>. For a fact that you do not have, write <search> a query </search>, and what is found "
            "follows between <result> and </result>; go on thinking from there, and search again where that helps. "
            "When you are done, give the final answer between <answer> and </answer>, with its exact words in "
            r"\boxed{}: <think> ... </think> <search> ... </search> <result> ... </result> <think> ... </think> "
            r"<answer> The final answer is \[ \boxed{the exact words} \] </answer>",
        ),
        Message("user", "{question}"),
    ),
    closed_prompt=(
        Message(
            "system",
            "You solve a question step by step. Your reasoning stands between <think> and </think>. When you are "
            r"done, give the final answer between <answer> and </answer>, with its exact words in \boxed{}: "
            r"<think> ... </think> <answer> The final answer is \[ \boxed{the exact words} \] </answer>",
        ),
        Message("user", "{question}"),
    ),
    stops=("</search>",),
    extract=("answer", "boxed"),
    sequence="(?=.*T)(?:[Tx]|SO)*A[Tx]*",  # at least one thought, one answer, and behind each search a result
    search=("<search>", "</search>"),
    answer=("<answer>", "</answer>"),
    think=("<think>", "</think>"),
    result=("<result>", "</result>"),
    needs_end=True,
    observation=" <result>\n{found}\n</result>",
    document="{title}\n{text}",
    between="\n\n",
)
