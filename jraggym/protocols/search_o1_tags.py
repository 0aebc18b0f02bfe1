r"""Search-o1 (arXiv 2501.05366) in its own tags: searches bring digests, and answers are \boxed{}.

RAG-Gym's agent of this name is another protocol (`jraggym.agents.search_o1`).
"""

from __future__ import annotations

from jraggym.chat_model import Message
from jraggym.protocols.protocol import Protocol

SEARCH_O1_TAGS = Protocol(
    name="search_o1_tags",
    prompt=(
        Message(
            "user",
            "You are good at reasoning, and you can search the web while you reason. To do so, write "
            "<|begin_search_query|> a query <|end_search_query|>. The pages that are found are read for you, and what "
            "they say about your query is put between <|begin_search_result|> and <|end_search_result|>; then you go "
            "on. You can search several times, up to a limit, and there is no use in the same query twice.\n\n"
            "Question: {question}\n\nReason step by step, search for what you do not know, and end with the final "
            r"answer as \boxed{the answer}.",
        ),
    ),
    closed_prompt=(
        Message(
            "user",
            "Question: {question}\n\nReason step by step, and end with the final answer as "
            r"\boxed{the answer}.",
        ),
    ),
    stops=("<|end_search_query|>",),
    extract=("boxed",),
    sequence="(?:x?SO)*x",
    search=("<|begin_search_query|>", "<|end_search_query|>"),
    result=("<|begin_search_result|>", "<|end_search_result|>"),
    observation="\n\n<|begin_search_result|>{found}<|end_search_result|>\n\n",
    document="{title}: {text}",
    digests=True,
    repeated="This query has been searched for before; what it found stands above.",
    limit="The limit of searches is reached, and no further one is possible.",
)
