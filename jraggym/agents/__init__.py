"""Search agents, a file each: from the plain model to Re2Search, and two baselines from the literature."""

from jraggym.agents.agent import COMPONENTS, Agent
from jraggym.agents.cot import COT
from jraggym.agents.direct import DIRECT
from jraggym.agents.ircot import IRCOT
from jraggym.agents.iter_retgen import ITER_RETGEN
from jraggym.agents.rag import RAG
from jraggym.agents.re2search import RE2SEARCH
from jraggym.agents.react import REACT
from jraggym.agents.search_o1 import SEARCH_O1

AGENTS: dict[str, Agent] = {
    "direct": DIRECT,
    "cot": COT,
    "rag": RAG,
    "react": REACT,
    "search_o1": SEARCH_O1,
    "re2search": RE2SEARCH,
    "ircot": IRCOT,
    "iter_retgen": ITER_RETGEN,
}

__all__ = ["AGENTS", "COMPONENTS", "Agent"]
