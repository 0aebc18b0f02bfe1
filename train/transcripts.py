"""ReSearch and Search-R1: python -m train.transcripts research-rl [--out DIR] [--seed N] [any other field]

First the warm start in the recipe's tags (research-rl-start, search-r1-start), then the recipe. The experiments are
configs/research_rl*.py and configs/search_r1*.py; `python -m train.transcripts research-rl --help` lists every field.
"""

from __future__ import annotations

from configs import research_rl, research_rl_start, search_r1, search_r1_ppo, search_r1_start
from jraggym.recipes.transcripts import train_transcripts
from train.job import entry

EXPERIMENTS = {
    "research-rl-start": ("the warm start in ReSearch's tags", research_rl_start.EXPERIMENT),
    "research-rl": ("ReSearch: GRPO, F1 behind the format gate", research_rl.EXPERIMENT),
    "search-r1-start": ("the warm start in Search-R1's tags", search_r1_start.EXPERIMENT),
    "search-r1": ("Search-R1: GRPO, exact match", search_r1.EXPERIMENT),
    "search-r1-ppo": ("Search-R1: PPO, exact match", search_r1_ppo.EXPERIMENT),
}


def main() -> None:
    entry(EXPERIMENTS, train_transcripts)


if __name__ == "__main__":
    main()
