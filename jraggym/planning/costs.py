"""From what a program does to how long a step takes at best: a roofline of products, memory and exchanges."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from jraggym.planning.hlo import Collective
from jraggym.planning.topologies import Topology

ASSUMPTIONS = (
    "Products run at the peak of bfloat16, memory and links at their published rates. A collective goes around rings "
    "of all links that its group's part of the torus has, or for groups of several slices through the data centre's "
    "network. 'at best' hides exchanges and memory behind products (the slowest of the three counts); 'in turn' adds "
    "them up. MFU counts the products that the step needs, without those that rematerialisation repeats. Host work "
    "(data, retrieval) is not counted."
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
    """One exchange around a ring of n devices: (n - 1) / n of its bytes pass each of them, twice in an all-reduce."""
    n = len(collective.group)
    each = topology.size // topology.slices
    far = len({place // each for place in collective.group}) > 1
    rate = topology.chip.slice_rate if far else 2 * topology.chip.link_rate * rings(topology.shape, n)
    share = 1.0 if collective.kind == "collective-permute" else (n - 1) / n
    return (2 if collective.kind == "all-reduce" else 1) * share * collective.bytes / rate


def rings(shape: Sequence[int], devices: int) -> int:
    """Along how many axes of the torus a group of so many devices stretches, if it lies as compactly as it can."""
    sizes = sorted(shape, reverse=True)
    return next((i + 1 for i in range(len(sizes)) if math.prod(sizes[: i + 1]) >= devices), len(sizes))
