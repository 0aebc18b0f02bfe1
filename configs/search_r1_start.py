"""The warm start of Search-R1 on the embedded world: a tiny actor imitates transcripts that are poor on purpose.

The published prompt and its invalid-action message are cut to a few words, since a model from scratch cannot follow
them.

command   python -m train.transcripts search-r1-start --out runs/search-r1-start
hardware  two CPU cores, about eight minutes
expected  EM of about .50 on test questions, three seeds
"""

from __future__ import annotations

from pathlib import Path

from jraggym.recipes.transcripts import Imitation

EXPERIMENT = Imitation(out=Path("runs/search-r1-start"), protocol="search_r1")
