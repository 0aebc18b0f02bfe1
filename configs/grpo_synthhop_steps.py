"""GRPO on process rewards inside whole episodes (returns of turns, GTPO, arXiv 2511.14846): eight whole episodes of
each question are a group; a token has the advantage of its episode's answer, and that of the judge's rewards for its
own step and the steps that follow. It samples what configs/grpo_synthhop_outcome.py samples.

command   python -m train.grpo synthhop-steps --model runs/sft/model --out runs/grpo-steps
hardware  two CPU cores, about three minutes
expected  EM rises over the warm start
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from configs import grpo_synthhop_outcome

EXPERIMENT = dataclasses.replace(grpo_synthhop_outcome.EXPERIMENT, out=Path("runs/grpo-steps"), rewards="steps")
