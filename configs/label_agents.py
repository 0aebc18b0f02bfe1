"""The paper's labels: a chat model ranks what an agent proposed, by sufficiency, utility and redundancy.

what      the episodes of an evaluation with ten candidates a turn; first they are collected:
          python -m eval.qa local --chat.model models/my-checkpoint --agent re2search --rules.candidates 10
          --rules.temperature 1 --benchmark hotpotqa --split train1000 --data-dir data/hotpotqa --out runs/candidates
command   python -m train.label agents --data runs/candidates --how.judge.key-variable OPENAI_API_KEY --out runs/ranked
hardware  none: the judge is asked over the network, once a turn
expected  of a real judge unknown; see train/critic.py for what learns from the labels
"""

from __future__ import annotations

from pathlib import Path

from jraggym.recipes.agent_labels import AgentLabel

EXPERIMENT = AgentLabel(out=Path("runs/ranked"), data=Path("runs/candidates"))
