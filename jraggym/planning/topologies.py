"""The accelerators that a plan is made for: a table of chips, and devices that can be compiled for but do not exist."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from typing import Any

from jax.experimental import topologies
from jax.sharding import Mesh

from jraggym.errors import InputError
from jraggym.sharding import make_mesh


@dataclass(frozen=True, slots=True)
class Chip:
    """One chip, as published; see CHIPS."""

    flops: float  # FLOP/s, peak in bfloat16
    hbm: float  # bytes that a program can have: what libtpu's compiler allows, less than what is printed on the box
    hbm_rate: float  # bytes/s
    link_rate: float  # bytes/s, one direction of one of its links to neighbours (ICI)
    slice_rate: float  # bytes/s to other slices (DCN), for each chip
    dimensions: int  # of its torus
    ring: int  # chips of the shortest axis that is a ring
    source: str


GIB = 2**30

# Published are FLOP/s, HBM and its rate, the rate of all links in both directions (400, 1200, 800 GB/s over 4, 6, 4
# links), and DCN for a pod of 256 (v5e 6.4, v6e 25.6 Tbit/s) or a chip (v5p 50 Gbit/s).
CHIPS = {
    "v5e": Chip(197e12, 15.75 * GIB, 819e9, 50e9, 3.1e9, 2, 16, "https://docs.cloud.google.com/tpu/docs/v5e"),
    "v5p": Chip(459e12, 95.74 * GIB, 2765e9, 100e9, 6.2e9, 3, 4, "https://docs.cloud.google.com/tpu/docs/v5p"),
    "v6e": Chip(918e12, 31.25 * GIB, 1638e9, 100e9, 12.5e9, 2, 16, "https://docs.cloud.google.com/tpu/docs/v6e"),
}


@dataclass(frozen=True, slots=True)
class Topology:
    """Some slices of equal shape: `2xv5p:4x4x4` has two of 64 chips."""

    kind: str
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chip(self) -> Chip:
        return CHIPS[self.kind]

    @property
    def size(self) -> int:
        """Chips in all slices."""
        return self.slices * math.prod(self.shape)

    @property
    def rings(self) -> tuple[bool, ...]:
        """Which axes end where they begin; smaller ones are lines (https://jax-ml.github.io/scaling-book/tpus)."""
        found = tuple(size % self.chip.ring == 0 for size in self.shape)
        # In three dimensions rings are closed by optical switches between whole cubes.
        return found if self.chip.dimensions == 2 else (all(found),) * 3

    def __str__(self) -> str:
        name = f"{self.kind}:{'x'.join(map(str, self.shape))}"
        return name if self.slices == 1 else f"{self.slices}x{name}"

    def mesh(self, data: int, fsdp: int, tensor: int) -> Mesh:
        """A mesh of its devices; slices are parts of the data axis. Raises InputError for sizes that do not fit."""
        if data * fsdp * tensor != self.size or data % self.slices:
            got = f"data={data}, fsdp={fsdp}, tensor={tensor} on {self.size} chips in {self.slices} slices"
            remedy = "Their product must be the number of chips, and data a multiple of the slices."
            raise InputError("the mesh does not fit the topology", got=got, remedy=remedy)
        return make_mesh(data, fsdp, tensor, devices=self._devices())

    def _devices(self) -> list[Any]:
        # On a machine without a TPU, libtpu would ask the cloud's metadata server what it runs on, and wait for it.
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        # It also lets one process of a machine have the TPU: here several may compile at the same time.
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        name = f"{self.kind}:{'x'.join(map(str, self.shape))}"
        more = {"num_slices": self.slices} if self.slices > 1 else {}
        try:
            return list(topologies.get_topology_desc(topology_name=name, platform="tpu", **more).devices)
        except Exception as error:
            text = str(error).splitlines()[0] if str(error) else type(error).__name__
            if re.search("libtpu|not found|PJRT|plugin|No module", text, re.IGNORECASE):
                remedy = "pip install 'jraggym[plan]'"
                raise InputError("the compiler for TPUs is not installed", got=text, remedy=remedy) from error
            raise InputError(f"no topology {name}", got=text, remedy="Name a shape that can be had.") from error


def parse_topology(text: str) -> Topology:
    """`v5p:4x4x4`, `v5e:8x8`, or with several slices `2xv5p:4x4x4`. Raises InputError for anything else."""
    found = re.fullmatch(r"(?:(\d+)x)?(v\w+):(\d+(?:x\d+)*)", text)
    if found is None:
        remedy = "Write KIND:SHAPE or SLICESxKIND:SHAPE, such as v5e:8x8 or 2xv5p:4x4x4."
        raise InputError("no topology", got=repr(text), remedy=remedy)
    slices, kind, shape = int(found[1] or 1), found[2], tuple(map(int, found[3].split("x")))
    if kind not in CHIPS:
        raise InputError("unknown chip", got=kind, remedy=f"Use one of {', '.join(CHIPS)}.")
    if len(shape) != CHIPS[kind].dimensions or min(*shape, slices) < 1:
        example = "x".join("4" * CHIPS[kind].dimensions)
        remedy = f"Its torus has {CHIPS[kind].dimensions} dimensions: write {kind}:{example}."
        raise InputError(f"no shape of {kind}", got=found[3], remedy=remedy)
    return Topology(kind, shape, slices)
