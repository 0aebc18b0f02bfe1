"""Search-R1 (arXiv 2503.09516) with GRPO: five episodes of each question, k3 of 1e-3 in the loss, exact match as
reward; with --reward search_r1_format the later version, which rewards form and evidence, too. Rates and sizes are
those of a tiny actor.

command   python -m train.transcripts search-r1 --model runs/search-r1-start/model --out runs/search-r1
hardware  two CPU cores, about ten minutes; 14 to 25 beside two other jobs
expected  EM of .76 to .83 on 400 test questions from .48 to .53 at the start, three seeds
"""

from __future__ import annotations

from pathlib import Path

from jraggym.experience import GRPO
from jraggym.objectives.policy import PolicyLoss
from jraggym.recipes.transcripts import RecipeGrpo

EXPERIMENT = RecipeGrpo(
    out=Path("runs/search-r1"),
    model=Path("runs/search-r1-start/model"),
    protocol="search_r1",
    reward="search_r1_em",
    algorithm=GRPO(loss=PolicyLoss(kl="k3", kl_weight=1e-3)),
)
