"""Llama-3.1-8B (arXiv 2407.21783): all stages of training a search agent, at sizes for a slice of a TPU pod.

command   python -m train.plan dpo-llama-8b --topology v5p:4x4x4
          python -m train.dpo llama-8b --model MODEL --data runs/collect/data/data/dataset --data-dir data/hotpotqa
hardware  64 chips of v5e or v5p: a step of 128 states with 4 candidates each reads 262,144 tokens
expected  every training step, and collecting, fits v5e:8x8, v5p:4x4x4 and, with 256 rows for its 256 chips,
          v6e:16x16: SFT takes --settings.tokens 327680, DPO and the critic --settings.states 256, collecting
          --settings.episodes 256, GRPO and PPO --schedule.rows 256 --slots 256; see the table in the README. Not
          trained yet.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from jraggym.models.decoder import DecoderConfig, RopeScaling
from jraggym.onpolicy import Schedule
from jraggym.recipes.collecting import Collect
from jraggym.recipes.experiment import Devices
from jraggym.recipes.offline import CriticTraining, Dpo, Sft
from jraggym.recipes.online import Grpo, Ppo
from jraggym.recipes.settings import Settings
from jraggym.training import Optimization

MODEL = DecoderConfig(
    vocab=128_256,
    model=4_096,
    layers=32,
    query_heads=32,
    kv_heads=8,
    head_dim=128,
    feed_forward=14_336,
    rope_theta=500_000.0,
    norm_eps=1e-5,
    tied=False,
    qkv_bias=False,
    scale_embed=False,
    rope_scaling=RopeScaling("llama3", factor=8.0),
    dtype="bfloat16",
    remat="layer",
    attention="splash",
)
FOLDER = Path("models/llama-3.1-8b-instruct")
SETTINGS = Settings(
    model=MODEL,
    documents=3,
    max_prompt=1_024,
    max_action=256,
    edges=((1_024, 256),),
    tokens=128 * 1_280,
    states=128,
    contrasts=4,
    candidates=8,
    episodes=64,
)
DEVICES = Devices(fsdp=64)
SAMPLING = Devices(fsdp=8, tensor=8)  # each token reads all weights: the fewer chips gather them, the better
SCHEDULE = Schedule(iterations=100, updates=2, rows=64, prompt=1_024, action=256, candidates=8)


def adamw(steps: int, rate: float) -> Optimization:
    """AdamW on everything."""
    return Optimization(steps, matrix_rate=0.0, rate=rate, warmup=min(50, steps // 10), schedule="cosine")


def of(kind: str) -> dict:
    """The fields that all stages share."""
    return {
        **{"out": Path(f"runs/{kind}-llama-8b"), "model": FOLDER, "dataset": "hotpotqa"},
        **{"settings": SETTINGS, "devices": DEVICES},
    }


SFT = Sft(**of("sft"), optimization=adamw(1_000, 1e-5))
DPO = Dpo(**of("dpo"), optimization=adamw(500, 5e-7))
CRITIC = CriticTraining(**of("critic"), optimization=adamw(500, 2e-6))
COLLECT = dataclasses.replace(Collect(**of("collect")), devices=SAMPLING)
SAMPLED: dict = {"questions": 256, "slots": 64, "schedule": SCHEDULE, "rollout_devices": SAMPLING}
GRPO = Grpo(**of("grpo"), **SAMPLED, optimization=adamw(1, 1e-6))
PPO = Ppo(**of("ppo"), **SAMPLED, optimization=adamw(1, 1e-6), value_optimization=adamw(1, 5e-6))
