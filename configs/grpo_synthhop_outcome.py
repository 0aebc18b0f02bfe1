"""GRPO on outcome rewards, as ReSearch and Search-R1 have them: eight whole episodes of each question are a group, and
every token of an episode has its answer's F1 as reward. Sampled tokens are about those of configs/grpo_synthhop.py.

command   python -m train.grpo synthhop-outcome --model runs/sft/model --out runs/grpo-outcome
hardware  two CPU cores, about three minutes
expected  EM rises over the warm start
"""

from __future__ import annotations

from pathlib import Path

from jraggym.onpolicy import Schedule
from jraggym.recipes.online import Grpo

EXPERIMENT = Grpo(
    out=Path("runs/grpo-outcome"),
    model=Path("runs/sft/model"),
    rewards="outcome",
    questions=24,
    slots=96,
    schedule=Schedule(iterations=20, updates=4, rows=6, prompt=40, action=168, candidates=8),
)
