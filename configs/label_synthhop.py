"""Monte-Carlo roll-outs as labels of collected data: four continuations of every candidate.

command   python -m train.label synthhop --model runs/sft/model --data runs/collect/data/data/dataset --out runs/label
hardware  two CPU cores, about two minutes
expected  a mean reward of about .46; orders some 68 % of the pairs as the rule-based judge does
"""

from __future__ import annotations

from pathlib import Path

from jraggym.recipes.labelling import Label

EXPERIMENT = Label(out=Path("runs/label"))
