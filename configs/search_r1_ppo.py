"""Search-R1 (arXiv 2503.09516) with PPO: advantages with gamma = lambda = 1, k1 of 1e-3 in the reward, exact match.
As many episodes as configs/search_r1.py samples. Rates and sizes are those of a tiny actor.

command   python -m train.transcripts search-r1-ppo --model runs/search-r1-start/model --out runs/search-r1-ppo
hardware  two CPU cores, about ten minutes; 18 to 31 beside two other jobs
expected  EM of .77 to .83 on 400 test questions from .48 to .53 at the start, three seeds
"""

from __future__ import annotations

from pathlib import Path

from jraggym.experience import PPO
from jraggym.recipes.transcripts import RecipePpo

EXPERIMENT = RecipePpo(
    out=Path("runs/search-r1-ppo"),
    model=Path("runs/search-r1-start/model"),
    protocol="search_r1",
    reward="search_r1_em",
    algorithm=PPO(gamma=1.0, lam=1.0, reward_kl="k1", reward_kl_weight=1e-3),
)
