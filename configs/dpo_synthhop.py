"""DPO with an SFT term, reference log-probabilities kept beside the data.

command   python -m train.dpo synthhop --model runs/sft/model --data runs/collect/data/data/dataset --out runs/dpo
hardware  two CPU cores, about one minute
expected  EM about .15 to .25 above the warm start
"""

from __future__ import annotations

from pathlib import Path

from jraggym.recipes.offline import Dpo

EXPERIMENT = Dpo(out=Path("runs/dpo"))
