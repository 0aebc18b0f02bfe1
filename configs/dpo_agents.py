"""DPO of an agent: a chat model's good replies against its worse ones, in the agent's full prompts.

what      RAG-Gym's DPO: adapters of queries, keys and values; one epoch of about 3,000 states of 1,000 questions
command   python -m train.dpo agents --model models/my-checkpoint --data runs/ranked/labels/llm/dataset
          --out runs/dpo-agent, and then python -m eval.qa local --chat.model runs/dpo-agent/model
hardware  an accelerator for a model of 8 billion weights (not run); seconds for a tiny one
expected  unknown: no real language model was trained here
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from configs.critic_agents import DATA, LORA, MODEL, SETTINGS
from jraggym.recipes.experiment import AGENTS
from jraggym.recipes.offline import Dpo
from jraggym.training import Optimization

EXPERIMENT = Dpo(
    out=Path("runs/dpo-agent"),
    model=MODEL,
    data=DATA,
    dataset=AGENTS,
    settings=replace(SETTINGS, states=32),
    lora=LORA,
    parts=32,
    optimization=Optimization(94, matrix_rate=0.0, rate=2e-6, warmup=10, schedule="linear"),
    nll=0.0,
    below=0.5,
)
