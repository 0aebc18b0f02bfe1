"""The warm start of ReSearch on the embedded world: a tiny actor imitates transcripts that are poor on purpose.

The published prompt is cut to a few words, since a model from scratch cannot follow one, and </answer> ends an
episode: the tokenizer has no end token, which the published protocol waits for.

command   python -m train.transcripts research-rl-start --out runs/research-rl-start
hardware  two CPU cores, about eight minutes
expected  EM of .47 to .50 on test questions, three seeds, with 1.5 searches: what is wrong are answers that come too
          early, and comparisons
"""

from __future__ import annotations

from pathlib import Path

from jraggym.recipes.transcripts import Imitation

EXPERIMENT = Imitation(out=Path("runs/research-rl-start"), protocol="research_rl")
