"""Eight candidates for every state of 560 new questions, ranked by the rule-based judge.

command   python -m train.collect synthhop --model runs/sft/model --out runs/collect
hardware  two CPU cores, about half a minute
expected  some 1,900 states; the mean process reward is about .7
"""

from __future__ import annotations

from pathlib import Path

from jraggym.recipes.collecting import Collect

EXPERIMENT = Collect(out=Path("runs/collect"), model=Path("runs/sft/model"))
