"""A process reward model on the actor's trunk: pairs of good and worse candidates, and whether each one is good.

command   python -m train.critic synthhop --model runs/sft/model --data runs/collect/data/data/dataset --out runs/critic
hardware  two CPU cores, about one minute
expected  about 80 % of the held-out pairs are ranked rightly, the more the farther apart their ranks
"""

from __future__ import annotations

from pathlib import Path

from jraggym.recipes.offline import CriticTraining

EXPERIMENT = CriticTraining(out=Path("runs/critic"))
