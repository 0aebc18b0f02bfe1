"""Rewards of whole episodes: terms (answer, form, evidence), ways to combine them, and those of published systems."""

from jraggym.rewards.finished import Finished, Reward
from jraggym.rewards.r1_searcher import r1_searcher_stage1, r1_searcher_stage1_code, r1_searcher_stage2
from jraggym.rewards.research_rl import research_rl, research_rl_paper
from jraggym.rewards.search_r1 import search_r1_em, search_r1_format

REWARDS: dict[str, Reward] = {
    "research_rl": research_rl,
    "research_rl_paper": research_rl_paper,
    "search_r1_em": search_r1_em,
    "search_r1_format": search_r1_format(),
    "r1_searcher_stage1": r1_searcher_stage1,
    "r1_searcher_stage1_code": r1_searcher_stage1_code,
    "r1_searcher_stage2": r1_searcher_stage2(),
}

__all__ = ["REWARDS", "Finished", "Reward", "r1_searcher_stage2", "search_r1_format"]
