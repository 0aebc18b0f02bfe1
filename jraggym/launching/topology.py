"""Slices of TPUs: `v5p:4x4x4`, or `2xv6e:16x16` for two of them, as in `train.plan`, and what Google calls them."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

from jraggym.errors import InputError

PLANE = "1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16".split()
CUBE = "2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x16 8x16x16 16x16x16 16x16x24".split()


class Generation(NamedTuple):
    """A generation of TPUs: Google's name of a slice counts cores or chips, and a runtime image belongs to it.

    Source: cloud.google.com/tpu/docs (v5e, v5p, v6e; runtimes), read in 2025.
    """

    accelerator: str
    cores: int
    shapes: list[str]
    runtime: str


GENERATIONS = {
    "v5e": Generation("v5litepod", 1, PLANE, "v2-alpha-tpuv5-lite"),
    "v5p": Generation("v5p", 2, CUBE, "v2-alpha-tpuv5"),
    "v6e": Generation("v6e", 1, PLANE, "v2-alpha-tpuv6e"),
}


class Slices(NamedTuple):
    """So many slices of one shape."""

    number: int
    generation: str
    shape: str

    @property
    def accelerator_type(self) -> str:
        """Google's name of one slice: `v5litepod-64` counts chips, `v5p-128` counts cores, two a chip."""
        known = GENERATIONS[self.generation]
        return f"{known.accelerator}-{known.cores * math.prod(map(int, self.shape.split('x')))}"

    @property
    def runtime(self) -> str:
        """The image of the TPU VMs."""
        return GENERATIONS[self.generation].runtime


def parse(topology: str) -> Slices:
    """`[Nx]GENERATION:SHAPE` as slices. Raises InputError for what Google does not offer under a name of its own."""
    found = re.fullmatch(r"(?:(\d+)x)?(v\d+\w*):(\d+(?:x\d+)+)", topology)
    if found is None or int(found[1] or 1) < 1:
        raise InputError("no topology", got=repr(topology), remedy="Write v5p:4x4x4, or 2xv5p:4x4x4 for two slices.")
    number, generation, shape = int(found[1] or 1), found[2], found[3]
    if generation not in GENERATIONS:
        raise InputError("unknown TPU", got=repr(generation), remedy=f"Use one of {', '.join(GENERATIONS)}.")
    if shape not in GENERATIONS[generation].shapes:
        offered = ", ".join(GENERATIONS[generation].shapes)
        raise InputError(f"{generation} has no slice of this shape", got=shape, remedy=f"Use one of {offered}.")
    return Slices(number, generation, shape)
