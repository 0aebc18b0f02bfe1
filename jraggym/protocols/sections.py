"""RAG-Gym's sections and JSON object (`jraggym.agents.output`) in one growing text: ReAct without a new chat a turn."""

from __future__ import annotations

from jraggym.agents.prompts import DOCUMENTS, LAST, QUESTION, REJECTED
from jraggym.agents.react import FINISH, SYSTEM
from jraggym.chat_model import Message
from jraggym.protocols.protocol import Protocol

SECTIONS = Protocol(
    name="sections",
    prompt=(Message("system", SYSTEM), Message("user", f"### {QUESTION}\n{{question}}")),
    closed_prompt=(Message("system", FINISH), Message("user", f"### {QUESTION}\n{{question}}")),
    stops=("}\n```",),
    extract=("sections",),
    sequence="(SO)*F?A",
    reader="sections",
    marks=("###", "```"),
    observation=f"\n\n### {DOCUMENTS}\n{{found}}\n\n",
    document="[{rank}] {title}: {text}",
    invalid=f"\n\n### {REJECTED}\nIt is not in the form that was asked for. Write it again.\n\n",
    forced=f"\n\n### {LAST}\nNo search is left: answer now.\n\n",
)
