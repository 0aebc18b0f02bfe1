"""PPO as in the RAG-Gym paper: no judge, the rewards of freshly sampled actions are a trained critic's scores.

command   python -m train.ppo synthhop-critic --model runs/sft/model --critic runs/critic/model --out runs/ppo-critic
hardware  two CPU cores, about three minutes
expected  not measured; a critic can be deceived, which the KL term in the reward holds down
"""

from __future__ import annotations

from pathlib import Path

from jraggym.experience import PPO
from jraggym.onpolicy import Schedule
from jraggym.recipes.online import Ppo

EXPERIMENT = Ppo(
    out=Path("runs/ppo-critic"),
    model=Path("runs/sft/model"),
    critic=Path("runs/critic/model"),
    rewards="critic",
    questions=20,
    slots=20,
    algorithm=PPO(reward_kl_weight=0.05),
    schedule=Schedule(iterations=20, updates=4, rows=10, prompt=144, action=16, candidates=8),
)
