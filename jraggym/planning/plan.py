"""A plan: what each program of an experiment needs on a topology, from its real compilation."""

from __future__ import annotations

import dataclasses
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from jraggym.errors import InputError
from jraggym.planning.costs import Roofline, roofline
from jraggym.planning.flops import count_flops
from jraggym.planning.hlo import Collective, parse
from jraggym.planning.memory import bytes_on_device, kept_for_backward, parts_of_memory, refusal
from jraggym.planning.programs import Program, programs, without_recomputation
from jraggym.planning.topologies import GIB, Topology
from jraggym.recipes.experiment import Devices, Experiment
from jraggym.sharding import batch_shards

HELD = ("weights", "optimiser", "frozen", "batch", "value function", "policy", "merged actor")  # in memory all the time


@dataclass(frozen=True)
class Plan:
    """One program on one topology. A refused one has its memory and `message` alone."""

    experiment: str
    program: str
    topology: Topology
    devices: Devices
    remat: str
    parts: int  # micro-batches
    tokens: int
    memory: dict[str, float]  # bytes on each device, by part
    seconds: float  # of compilation
    message: str = ""  # why it is refused
    flops: float = 0.0  # over all devices
    useful: float = 0.0  # of these, what is not repeated to save memory
    traffic: float = 0.0  # bytes through a device's memory
    collectives: list[Collective] = field(default_factory=list)
    times: Roofline | None = None

    @property
    def peak(self) -> float:
        """Bytes on each device at the fullest moment."""
        return sum(self.memory.values())

    @property
    def margin(self) -> float:
        """Bytes of a device's memory that stay free; negative where they are missing."""
        return self.topology.chip.hbm - self.peak

    @property
    def fits(self) -> bool:
        return not self.message and self.margin >= 0

    def by_kind(self) -> dict[str, tuple[int, float]]:
        """How many collectives of each kind a run makes, and their bytes on a device."""
        found: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
        for collective in self.collectives:
            found[collective.kind][0] += collective.times
            found[collective.kind][1] += collective.times * collective.bytes
        return {kind: (int(count), size) for kind, (count, size) in sorted(found.items())}

    def remedies(self) -> list[str]:
        """What to change where it does not fit, the likeliest first."""
        largest = max(self.memory, key=lambda name: self.memory[name])
        held = sum(size for name, size in self.memory.items() if name in HELD)
        more = "a larger topology"
        if held > 0.6 * self.topology.chip.hbm:
            split = ["--devices.fsdp and --devices.tensor over all chips"] if self.devices.data > 1 else []
            return [*split, "--lora.rank 16 (no moments and gradients of whole matrices)", more]
        found = [] if self.remat == "layer" else ["--settings.model.remat layer"]
        if largest == "KV cache":
            found += ["fewer --slots or --settings.episodes", "--devices.tensor higher"]
        return [*found, f"--parts {2 * self.parts}", "fewer or shorter rows", "--devices.tensor higher", more]


def fitted(experiment: Experiment, topology: Topology) -> Experiment:
    """The experiment on all chips: its own mesh where that has as many, else its tensor axis and fsdp over the rest.

    Raises InputError where the tensor axis and the slices do not divide the chips.
    """
    sizes = dataclasses.astuple(experiment.devices)
    if sizes[0] * sizes[1] * sizes[2] == topology.size:
        return experiment
    data, tensor = topology.slices, experiment.devices.tensor
    if topology.size % (data * tensor):
        got = f"tensor={tensor} on {topology.size} chips in {data} slices"
        raise InputError("the chips cannot be split", got=got, remedy="Choose another --devices.tensor.")
    return dataclasses.replace(experiment, devices=Devices(data, topology.size // (data * tensor), tensor))


def plan(experiment: Experiment, topology: Topology, *, name: str = "", only: str | None = None) -> Iterator[Plan]:
    """Compiles the programs of an experiment, one after the other; `only` names one of them by its beginning."""
    devices = experiment.devices
    mesh = topology.mesh(devices.data, devices.fsdp, devices.tensor)
    plain = {p.name: p for p in programs(without_recomputation(experiment), mesh)}
    for program in programs(experiment, mesh):
        if only is None or program.name.startswith(only):
            yield _plan(experiment, topology, mesh, program, plain[program.name], name)


def _plan(experiment: Experiment, topology: Topology, mesh: Any, program: Program, plain: Program, name: str) -> Plan:
    start = time.perf_counter()
    traced = program.trace()
    model = experiment.settings.model
    known: dict[str, Any] = {
        **{"experiment": name, "program": program.name, "topology": topology, "devices": experiment.devices},
        **{"remat": model.remat, "parts": experiment.parts, "tokens": program.tokens},
    }
    kept = kept_for_backward(traced.jaxpr) // batch_shards(mesh)
    flops = count_flops(traced.jaxpr, program.trips)
    try:
        compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    except Exception as error:
        if (found := refusal(str(error), bytes_on_device(program.held))) is None:
            raise
        missing = parts_of_memory(program.held, None, kept, program.cache, needed=found[0])
        message = f"needs {found[0] / GIB:.1f} GiB of {found[1] / GIB:.1f}"
        return Plan(**known, memory=missing, seconds=time.perf_counter() - start, message=message)
    seconds = time.perf_counter() - start
    module = parse(compiled.as_text(), topology.size, program.trips)
    useful = min(flops, count_flops(plain.trace().jaxpr, program.trips))
    times = roofline(topology, flops, useful, module.traffic, module.collectives)
    return Plan(
        **known,
        memory=parts_of_memory(program.held, compiled.memory_analysis(), kept, program.cache),
        seconds=seconds,
        flops=flops,
        useful=useful,
        traffic=module.traffic,
        collectives=module.collectives,
        times=times,
    )


def search(
    experiment: Experiment,
    topology: Topology,
    *,
    name: str = "",
    only: str | None = None,
    report: Callable[[int, int, list[Plan]], None] | None = None,
) -> Iterator[list[Plan]]:
    """The plans of each choice of mesh, rematerialisation and micro-batches that is worth compiling.

    For each mesh the policies that keep most come first, each with as few micro-batches as fit: more of them repeat
    work. `report` gets (done, at most, the plans). Choices that the sizes forbid are left out.
    """
    options = choices(experiment, topology)
    settled: set[tuple[Devices, str]] = set()
    for number, option in enumerate(options, 1):
        key = (option.devices, option.settings.model.remat)
        if key in settled:
            continue
        try:
            found = list(plan(option, topology, name=name, only=only))
        except InputError:
            continue  # sizes that this mesh cannot split
        if found and all(p.fits for p in found):
            settled.add(key)
        if report is not None:
            report(number, len(options), found)
        yield found


def choices(experiment: Experiment, topology: Topology, most: int = 8) -> list[Experiment]:
    """Experiments that differ in mesh (tensor up to `most`, data over slices), remat and micro-batches."""
    model, found = experiment.settings.model, []
    for tensor in (1, 2, 4, 8):
        if tensor > most or topology.size % (tensor * topology.slices) or model.kv_heads % tensor:
            continue
        devices = Devices(topology.slices, topology.size // (tensor * topology.slices), tensor)
        for remat in ("none", "dots", "layer"):
            for parts in (1, 2, 4, 8):
                settings = dataclasses.replace(experiment.settings, model=dataclasses.replace(model, remat=remat))
                found.append(dataclasses.replace(experiment, devices=devices, parts=parts, settings=settings))
    return found


def best(plans: list[list[Plan]]) -> list[Plan] | None:
    """The plans of the choice whose programs all fit and take the least time together; None where none fits."""

    def seconds(found: list[Plan]) -> float:
        return sum((p.times.best + p.times.in_turn) / 2 for p in found if p.times is not None)

    fitting = [found for found in plans if found and all(p.fits for p in found)]
    return min(fitting, key=seconds) if fitting else None
