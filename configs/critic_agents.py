"""The critic of the transfer experiment: an agent's full prompts in a chat model's words, and a judge's ranks.

what      RAG-Gym's critic: adapters of queries, keys and values, pairs of the best against worse candidates
command   python -m train.critic agents --model models/my-checkpoint --data runs/ranked/labels/llm/dataset
          --out runs/critic, and then python -m eval.qa transfer --critic runs/critic/model
hardware  an accelerator for a model of 8 billion weights (not run); seconds for a tiny one
expected  unknown: no real language model was trained here
"""

from __future__ import annotations

from pathlib import Path

from jraggym.models.decoder import DecoderConfig
from jraggym.models.lora import Lora
from jraggym.recipes.experiment import AGENTS
from jraggym.recipes.offline import CriticTraining
from jraggym.recipes.settings import Settings
from jraggym.training import Optimization

MODEL, DATA = Path("models/my-checkpoint"), Path("runs/ranked/labels/llm/dataset")
LORA = Lora(256, 512.0, 0.05, ("q", "k", "v"))
SETTINGS = Settings(
    max_prompt=4_096,
    max_action=1_024,
    contrasts=10,
    states=8,
    model=DecoderConfig(dtype="bfloat16", remat="layer"),
)
EXPERIMENT = CriticTraining(
    out=Path("runs/critic"),
    model=MODEL,
    data=DATA,
    dataset=AGENTS,
    settings=SETTINGS,
    lora=LORA,
    parts=8,
    optimization=Optimization(375, matrix_rate=0.0, rate=1e-5, warmup=10, schedule="linear"),
    pointwise=0.0,
    below=0.5,
    centre=0.01,
    likelihood=False,
)
