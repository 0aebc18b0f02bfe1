"""Llama-3.1-70B (arXiv 2407.21783): all stages of training a search agent, at sizes for a slice of a TPU pod.

command   python -m train.plan dpo-llama-70b --topology v5p:4x4x4
          python -m train.dpo llama-70b --model MODEL --data runs/collect/data/data/dataset --data-dir data/hotpotqa
hardware  64 chips of v5p, or 256 of v6e with --settings.states 256 (SFT: --settings.tokens 327680); SFT and DPO of
          the adapters of llama-70b-lora 64 chips of v5e
expected  see the table in the README. Not trained yet.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from configs import llama_8b
from jraggym.models.lora import Lora
from jraggym.recipes.collecting import Collect
from jraggym.recipes.offline import CriticTraining, Dpo, Sft
from jraggym.recipes.online import Grpo, Ppo

MODEL = dataclasses.replace(
    llama_8b.MODEL, model=8_192, layers=80, query_heads=64, kv_heads=8, head_dim=128, feed_forward=28_672
)
SETTINGS = dataclasses.replace(llama_8b.SETTINGS, model=MODEL, states=64, tokens=64 * 1_280)


def of(kind: str) -> dict:
    """The fields that all stages share."""
    own = {"out": Path(f"runs/{kind}-llama-70b"), "model": Path("models/llama-3.1-70b-instruct")}
    return {**llama_8b.of(kind), **own, "settings": SETTINGS}


SFT = Sft(**of("sft"), optimization=llama_8b.adamw(1_000, 5e-6))
DPO = Dpo(**of("dpo"), optimization=llama_8b.adamw(500, 3e-7))
CRITIC = CriticTraining(**of("critic"), optimization=llama_8b.adamw(500, 1e-6))
COLLECT = dataclasses.replace(Collect(**of("collect")), devices=llama_8b.SAMPLING)
GRPO = Grpo(**of("grpo"), **llama_8b.SAMPLED, optimization=llama_8b.adamw(1, 5e-7))
PPO = Ppo(
    **of("ppo"),
    **llama_8b.SAMPLED,
    optimization=llama_8b.adamw(1, 5e-7),
    value_optimization=llama_8b.adamw(1, 2e-6),
)
ADAPTERS = Lora(rank=16)
SFT_LORA = dataclasses.replace(SFT, lora=ADAPTERS, optimization=llama_8b.adamw(1_000, 1e-4))
DPO_LORA = dataclasses.replace(DPO, lora=ADAPTERS, optimization=llama_8b.adamw(500, 1e-5))
