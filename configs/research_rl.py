"""ReSearch (arXiv 2503.19470): GRPO on five episodes of each question, k3 of 1e-3 and entropy of 1e-3 in the loss,
and F1 or 0.1 as reward behind the format gate. Rates and sizes are those of a tiny actor; </answer> ends an episode,
since its tokenizer has no end token.

command   python -m train.transcripts research-rl --model runs/research-rl-start/model --out runs/research-rl
hardware  two CPU cores, about ten minutes; 14 to 25 beside two other jobs
expected  EM of .79 to .80 on 400 test questions from .47 to .50 at the start, three seeds; searches where 1, 2, 3 are
          needed go from 1.0, 1.6, 1.9 to 1.2, 2.1, 2.9
"""

from __future__ import annotations

from pathlib import Path

from jraggym.experience import GRPO
from jraggym.objectives.policy import PolicyLoss
from jraggym.recipes.transcripts import RecipeGrpo

EXPERIMENT = RecipeGrpo(
    out=Path("runs/research-rl"),
    model=Path("runs/research-rl-start/model"),
    protocol="research_rl",
    reward="research_rl",
    algorithm=GRPO(loss=PolicyLoss(kl="k3", kl_weight=1e-3, entropy_weight=1e-3)),
)
