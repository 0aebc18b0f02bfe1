"""Jobs of the entries made small enough for a test, in one world that is made once."""

import functools
from dataclasses import replace

import pytest

import train.job
from jraggym.models.decoder import DecoderConfig
from jraggym.training import Optimization

MODEL = DecoderConfig(model=32, layers=2, query_heads=2, kv_heads=2, head_dim=16, feed_forward=64)
FEW = Optimization(4, matrix_rate=0.0, rate=1e-3, warmup=1)


@pytest.fixture(scope="module", autouse=True)
def one_world():
    """All jobs here have the same world and indexes: make them once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.job, "synthhop_task", functools.cache(train.job.synthhop_task))
        made, build = {}, train.job._retriever

        def once(split, *rest):
            if id(split) not in made:
                made[id(split)] = build(split, *rest)
            return made[id(split)]

        patch.setattr(train.job, "_retriever", once)
        yield


def small(experiment, out, **fields):
    settings = replace(
        experiment.settings,
        **{"demonstrations": 300, "collected": 20, "development": 6, "test": 6, "vocab": 700, "vector": 32},
        **{
            "candidates": 4,
            "contrasts": 3,
            "states": 2,
            "episodes": 8,
            "model": MODEL,
            "short_first": 0,
            "tokens": 800,
        },
    )
    return replace(experiment, out=out, settings=settings, **fields)
