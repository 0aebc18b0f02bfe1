"""The settings of the main job."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from jraggym.data.plan import Faults
from jraggym.data.synthhop import HOPS
from jraggym.models.decoder import DecoderConfig
from jraggym.training import Optimization


@dataclass(frozen=True)
class Settings:
    """Everything that decides the numbers. Letters: P prompt, A action tokens, K candidates."""

    seed: int = 0
    hops: int = HOPS  # the longest chain of relations of the embedded world
    demonstrations: int = 16_000
    collected: int = 560  # questions, in each of the two rounds
    development: int = 200
    test: int = 400
    vocab: int = 1_024
    max_turns: int = 5
    documents: int = 1  # per search
    vector: int = 512  # width of the TF-IDF vectors
    max_prompt: int = 144  # P
    max_action: int = 16  # A
    candidates: int = 8  # K
    temperature: float = 1.0  # of the collection
    test_temperature: float = 0.7
    closed_book: float = 0.04  # share of demonstrations that answer without any search
    faults: Faults = field(default_factory=Faults)
    model: DecoderConfig = field(default_factory=DecoderConfig)
    edges: tuple[tuple[int, int], ...] = ((32, 64), (32, 112), (32, 192))  # (P, A) of whole-episode batches
    tokens: int = 3_072  # per whole-episode batch
    states: int = 12  # per batch of labelled candidates
    episodes: int = 80  # per batch of a rollout
    short_first: int = 80
    warm_start: Optimization = field(default_factory=lambda: Optimization(560, rate=6e-3, warmup=20))
    actor: Optimization = field(default_factory=lambda: Optimization(80, matrix_rate=0.0, rate=5e-4, warmup=10))
    critic: Optimization = field(default_factory=lambda: Optimization(160, matrix_rate=0.0, rate=1e-3, warmup=10))
    contrasts: int = 4  # K of a training batch: distinct candidates of a state
    below: float = 0.75  # rewards under this make a candidate a worse one; the rule-based judge's second rank is sure
    beta: float = 0.1  # DPO
    nll: float = 1.0  # DPO
    pointwise: float = 0.5  # critic

    def smoke(self) -> Settings:
        """A few steps of everything."""
        few = {name: dataclasses.replace(getattr(self, name), steps=4) for name in ("actor", "critic")}
        warm = dataclasses.replace(self.warm_start, steps=90)
        fewer = dataclasses.replace(self, demonstrations=min(self.demonstrations, 2_000), collected=32, test=16)
        fewer = dataclasses.replace(fewer, episodes=16, candidates=4, states=4, tokens=1_024)
        return dataclasses.replace(fewer, warm_start=warm, short_first=90, **few)

    def fingerprint(self) -> dict[str, Any]:
        """The settings as plain JSON values."""
        return dataclasses.asdict(self)
