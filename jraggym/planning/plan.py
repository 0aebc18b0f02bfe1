"""A plan: what each program of an experiment needs on a topology, from its real compilation."""

from __future__ import annotations

import dataclasses
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import jax

from jraggym.errors import InputError
from jraggym.planning.costs import Roofline, roofline
from jraggym.planning.flops import count_flops
from jraggym.planning.hlo import Collective, parse
from jraggym.planning.memory import bytes_on_device, kept_for_backward, parts_of_memory, refusal
from jraggym.planning.programs import Program, programs, without_recomputation
from jraggym.planning.topologies import GIB, Topology
from jraggym.recipes.experiment import Devices, Experiment
from jraggym.recipes.online import Sampled
from jraggym.sharding import batch_shards

# In memory all the time.
HELD = ("weights", "optimiser", "frozen", "batch", "value function", "policy", "rollout actor", "reward critic")


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
    rows: int = 0  # that --parts splits
    runs: int = 1  # in an iteration
    flag: str = "--devices"  # by which its mesh is given
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
        data, fsdp, tensor = dataclasses.astuple(self.devices)
        higher = f"{self.flag}.tensor {2 * tensor} {self.flag}.fsdp {max(1, fsdp // 2)}"
        more = "a larger topology"
        if self.memory.get("KV cache"):
            return [higher, "fewer --slots (collecting: --settings.episodes)", more]
        held = sum(size for name, size in self.memory.items() if name in HELD)
        if held > 0.6 * self.topology.chip.hbm:
            split = [f"{self.flag}.fsdp and {self.flag}.tensor over all chips"] if data > 1 else []
            return [*split, "--lora.rank 16 (no moments and gradients of whole matrices)", more]
        found = [] if self.remat == "layer" else ["--settings.model.remat layer"]
        if self.rows and self.rows % (2 * self.parts * data * fsdp) == 0:
            found.append(f"--parts {2 * self.parts}")
        return [*found, higher, "fewer or shorter rows", more]


def fitted(experiment: Experiment, topology: Topology) -> Experiment:
    """The experiment on all chips: a mesh of its own that has as many, else its tensor axis and fsdp over the rest.

    Raises InputError where the tensor axis and the slices do not divide the chips.
    """
    found = dataclasses.replace(experiment, devices=_on_all(experiment.devices, topology, "--devices"))
    if isinstance(found, Sampled) and found.rollout_devices != Devices():
        there = _on_all(found.rollout_devices, topology, "--rollout-devices")
        found = dataclasses.replace(found, rollout_devices=there)
    return found


def _on_all(devices: Devices, topology: Topology, flag: str) -> Devices:
    if devices.data * devices.fsdp * devices.tensor == topology.size:
        return devices
    data, tensor = topology.slices, devices.tensor
    if topology.size % (data * tensor):
        got = f"tensor={tensor} on {topology.size} chips in {data} slices"
        raise InputError("the chips cannot be split", got=got, remedy=f"Choose another {flag}.tensor.")
    return Devices(data, topology.size // (data * tensor), tensor)


def plan(experiment: Experiment, topology: Topology, *, name: str = "", only: str | None = None) -> Iterator[Plan]:
    """Compiles the programs of an experiment, one after the other; `only` names some of them by their beginning.

    Raises InputError for sizes that do not fit together, and where `only` names none.
    """
    devices = experiment.devices
    mesh = topology.mesh(devices.data, devices.fsdp, devices.tensor)
    plain = {p.name: p for p in programs(without_recomputation(experiment), mesh)}
    chosen = [p for p in programs(experiment, mesh) if p.name.startswith(only or "")]
    if not chosen:
        raise InputError("no such program", got=only, remedy=f"Use the beginning of {', '.join(plain)}.")
    for program in chosen:
        yield _plan(experiment, topology, mesh, program, plain[program.name], name)


def _plan(experiment: Experiment, topology: Topology, mesh: Any, program: Program, plain: Program, name: str) -> Plan:
    start = time.perf_counter()
    traced = program.trace()
    model = experiment.settings.model
    known: dict[str, Any] = {
        **{"experiment": name, "program": program.name, "topology": topology},
        **{"remat": model.remat, "parts": experiment.parts, "tokens": program.tokens},
        **{"rows": program.rows, "runs": program.runs, "devices": program.devices or experiment.devices},
        "flag": "--rollout-devices" if program.devices else "--devices",
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
    work. `report` gets (done, at most, the plans). Choices that the sizes forbid are left out; where they forbid all,
    the InputError of the first, which splits least, is raised.
    """
    options, tried = choices(experiment, topology), False
    wrong: InputError | None = None
    settled: set[tuple[Devices, str]] = set()
    for number, option in enumerate(options, 1):
        key = (option.devices, option.settings.model.remat)
        if key in settled:
            continue
        try:
            found = list(plan(option, topology, name=name, only=only))
        except InputError as error:
            wrong = wrong or error  # sizes that this mesh cannot split
            continue
        except (jax.errors.JaxRuntimeError, NotImplementedError) as error:  # of the compiler; others may pass it
            found = [_failed(option, topology, error, name)]
        tried = True
        if found and all(p.fits for p in found):
            settled.add(key)
        if report is not None:
            report(number, len(options), found)
        yield found
    if wrong is not None and not tried:
        raise wrong


def _failed(option: Experiment, topology: Topology, error: Exception, name: str) -> Plan:
    """The refused plan of a choice that the compiler could not compile."""
    message = f"the compiler failed: {(str(error) or type(error).__name__).splitlines()[0][:200]}"
    remat, where = option.settings.model.remat, (name, "one of its programs", topology, option.devices)
    return Plan(*where, remat, option.parts, tokens=0, memory={}, seconds=0.0, message=message)


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
    """The plans of the choice whose programs all fit and take an iteration the least time; None where none fits."""

    def seconds(found: list[Plan]) -> tuple[float, float]:
        each = [(p.runs, (p.times.best + p.times.in_turn) / 2) for p in found if p.times is not None]
        return sum(runs * time for runs, time in each), sum(time for _, time in each)

    fitting = [found for found in plans if found and all(p.fits for p in found)]
    return min(fitting, key=seconds) if fitting else None
