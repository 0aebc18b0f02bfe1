"""PPO of an agent: new replies to the prompts that it was once shown, rewarded by a critic's scores.

what      RAG-Gym's PPO: single actions from recorded states, full parameters, nothing is executed
command   python -m train.ppo agents --model models/my-checkpoint --data runs/ranked/labels/llm/dataset
          --critic runs/critic/model --out runs/ppo-agent
hardware  a slice of a pod for a model of 8 billion weights (not run); seconds for a tiny one
expected  unknown: no real language model was trained here, and the paper does not print its settings
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from configs.critic_agents import DATA, MODEL, SETTINGS
from jraggym.onpolicy import Schedule
from jraggym.recipes.experiment import AGENTS
from jraggym.recipes.online import Ppo
from jraggym.training import Optimization

EXPERIMENT = Ppo(
    out=Path("runs/ppo-agent"),
    model=MODEL,
    data=DATA,
    dataset=AGENTS,
    rewards="critic",
    critic=Path("runs/critic/model"),
    questions=128,
    slots=32,
    settings=replace(SETTINGS, temperature=1.0),
    schedule=Schedule(iterations=25, updates=4, rows=32, prompt=4_096, action=1_024, candidates=4),
    optimization=Optimization(1, matrix_rate=0.0, rate=1e-6, warmup=3, schedule="linear"),
    value_optimization=Optimization(1, matrix_rate=0.0, rate=5e-6, warmup=3, schedule="linear"),
    parts=8,
)
