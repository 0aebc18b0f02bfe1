"""SFT of an agent: a chat model imitates the good replies to the agent's full prompts.

what      RAG-Gym's SFT: adapters of queries, keys and values; three epochs of about 3,000 states of 1,000 questions
command   python -m train.sft agents --model models/my-checkpoint --data runs/ranked/labels/llm/dataset
          --out runs/sft-agent, and then python -m eval.qa local --chat.model runs/sft-agent/model
hardware  an accelerator for a model of 8 billion weights (not run); seconds for a tiny one
expected  unknown: no real language model was trained here
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from configs.critic_agents import DATA, LORA, MODEL, SETTINGS
from jraggym.recipes.experiment import AGENTS
from jraggym.recipes.offline import Sft
from jraggym.training import Optimization

EXPERIMENT = Sft(
    out=Path("runs/sft-agent"),
    model=MODEL,
    data=DATA,
    dataset=AGENTS,
    settings=replace(SETTINGS, states=64),
    lora=LORA,
    parts=64,
    optimization=Optimization(140, matrix_rate=0.0, rate=5e-5, warmup=10, schedule="linear"),
)
