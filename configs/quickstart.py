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
        demonstrations=400,
        collected=160,
        development=30,
        test=277,
        vocab=1_500,
        max_prompt=1_024,
        documents=1,
        episodes=16,
        max_action=32,
        candidates=4,
        contrasts=3,
        states=4,
        tokens=6_144,
        edges=((192, 512), (192, 1_536)),
        short_first=0,
        faults=Faults(premature_groups=1.0, premature=0.3),
        model=DecoderConfig(vocab=1_500),
        warm_start=Optimization(400, rate=6e-3, warmup=10),
        actor=Optimization(60, matrix_rate=0.0, rate=5e-4, warmup=10),
        critic=Optimization(60, matrix_rate=0.0, rate=1e-3, warmup=10),
    ),
}
