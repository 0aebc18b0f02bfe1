"""Presets of the main job.

synthhop   the embedded world; python -m train.quickstart --out runs/quickstart
hotpotqa   real questions; python -m train.quickstart --dataset hotpotqa --data-dir DIR --out runs/hotpotqa
           A from-scratch actor answers few of them: the run reports what it finds, next to its floor.
"""

from __future__ import annotations

from jraggym.data.plan import Faults
from jraggym.models.decoder import DecoderConfig
from jraggym.recipes.settings import Settings
from jraggym.training import Optimization

PRESETS = {
    "synthhop": Settings(),
    "hotpotqa": Settings(
        demonstrations=280,
        collected=48,
        development=30,
        test=100,
        vocab=4_096,
        max_prompt=1_024,
        documents=1,
        episodes=16,
        max_action=32,
        candidates=4,
        contrasts=3,
        states=4,
        tokens=4_096,
        edges=((128, 512), (128, 1_536)),
        short_first=0,
        faults=Faults(premature_groups=1.0, premature=0.3),
        model=DecoderConfig(vocab=4_096),
        warm_start=Optimization(60, rate=6e-3, warmup=10),
        actor=Optimization(10, matrix_rate=0.0, rate=5e-4, warmup=2),
        critic=Optimization(10, matrix_rate=0.0, rate=1e-3, warmup=2),
    ),
}
