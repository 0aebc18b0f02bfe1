"""Tag protocols, a file each, and the functions that read them: pure text, without tokens or arrays."""

from jraggym.protocols.protocol import Protocol, neutralise, observation, opening, plain
from jraggym.protocols.r1_searcher import R1_SEARCHER
from jraggym.protocols.reading import final_answer, read_action
from jraggym.protocols.research_rl import RESEARCH_RL
from jraggym.protocols.search_o1_tags import SEARCH_O1_TAGS
from jraggym.protocols.search_r1 import SEARCH_R1
from jraggym.protocols.sections import SECTIONS
from jraggym.protocols.validity import is_valid

PROTOCOLS: dict[str, Protocol] = {
    "search_r1": SEARCH_R1,
    "research_rl": RESEARCH_RL,
    "search_o1_tags": SEARCH_O1_TAGS,
    "sections": SECTIONS,
    "r1_searcher": R1_SEARCHER,
}

__all__ = [
    "PROTOCOLS",
    "Protocol",
    "final_answer",
    "is_valid",
    "neutralise",
    "observation",
    "opening",
    "plain",
    "read_action",
]
