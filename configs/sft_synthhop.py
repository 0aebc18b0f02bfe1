"""The warm start: a half-million-parameter actor learns the format, and to search, from imperfect demonstrations.

command   python -m train.sft synthhop --out runs/sft
hardware  two CPU cores, about two minutes
expected  EM of about .35 to .50 on development questions, closed book about .1
"""

from __future__ import annotations

from pathlib import Path

from jraggym.recipes.offline import Sft

EXPERIMENT = Sft(out=Path("runs/sft"))
