"""From what a program does to how long a step takes at best: a roofline of products, memory and exchanges."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations

from jraggym.planning.hlo import Collective
from jraggym.planning.topologies import Topology

ASSUMPTIONS = (
    "Products run at the peak of bfloat16, memory and links at their published rates. A collective uses both "
    "directions of each axis of the torus that its group has whole and that is a ring (v5e, v6e: of 16 chips; v5p: in "
    "whole cubes of 4 x 4 x 4), one direction of an axis that is none, and one link where its group splits an axis. "
    "Between slices it goes through the data centre's network, each chip with its part alone. 'at best' hides "
    "exchanges and memory behind products (the slowest of the three counts); 'in turn' adds them up. MFU counts the "
    "products that the step needs, without those that rematerialisation repeats, but with the blocks of attention "
    "that a mask hides in part or wholly: it is up to 12% too high for dpo-llama-8b. Host work (data, retrieval) is "
    "not counted."
)


@dataclass(frozen=True, slots=True)
class Roofline:
    """Seconds of one run of a program on each device, and the share of the peak that useful products make up."""

    products: float
    memory: float
    exchange: float
    useful: float  # seconds of the useful products at peak

    @property
    def best(self) -> float:
        return max(self.products, self.memory, self.exchange)

    @property
    def in_turn(self) -> float:
        return self.products + self.memory + self.exchange

    @property
    def bound(self) -> str:
        """What takes longest."""
        return max(("products", "memory", "exchange"), key=lambda name: getattr(self, name))

    @property
    def mfu(self) -> tuple[float, float]:
        """In turn, and at best."""
        return self.useful / self.in_turn, self.useful / self.best


def roofline(
    topology: Topology, flops: float, useful: float, traffic: float, collectives: Iterable[Collective]
) -> Roofline:
    """Args: flops and useful over all devices, traffic in bytes on each."""
    peak, chip = topology.size * topology.chip.flops, topology.chip
    exchange = sum(c.times * exchange_seconds(topology, c) for c in collectives)
    return Roofline(flops / peak, traffic / chip.hbm_rate, exchange, useful / peak)


def exchange_seconds(topology: Topology, collective: Collective) -> float:
    """Seconds of one exchange between n devices: (n - 1) / n of its bytes pass each of them, twice in an all-reduce.

    Of several slices each first gathers or reduces on its own, so that a device tells other slices its part alone.
    """
    chip, each = topology.chip, topology.size // topology.slices
    slices = len({place // each for place in collective.group})
    if collective.kind == "collective-permute":  # to one neighbour
        return collective.bytes / (chip.slice_rate if slices > 1 else chip.link_rate)
    near = len(collective.group) // slices
    within = (near - 1) / near * collective.bytes / (links(topology, near) * chip.link_rate)
    between = (slices - 1) / slices * collective.bytes / near / chip.slice_rate
    return (2 if collective.kind == "all-reduce" else 1) * (within + between)


def links(topology: Topology, devices: int) -> int:
    """Over how many links at once each device of a group within a slice sends.

    An axis of the torus that the group has whole gives two where it is a ring, else one, since its ends have no more.
    A group that splits an axis is a line of neighbours: one.
    """
    axes = [(size, 2 if ring else 1) for size, ring in zip(topology.shape, topology.rings, strict=True) if size > 1]
    whole = (part for count in range(1, len(axes) + 1) for part in combinations(axes, count))
    return max((sum(ways for _, ways in part) for part in whole if math.prod(n for n, _ in part) == devices), default=1)
