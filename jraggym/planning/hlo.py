"""What a compiled program sends between devices and through memory, read from its text.

The text is that of one device. A loop's body counts as often as it runs: the number stands in the loop's condition,
or is given for loops that end when the data says so.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BITS = {"pred": 8, "bf16": 16, "token": 0}  # others end in their bits: f32, s8, u4, f8e4m3fn
FREE = frozenset("parameter constant tuple get-tuple-element bitcast after-all partition-id replica-id".split())
DONE = re.compile("-(done|update)$")


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    root: bool

    def called(self, attribute: str) -> str | None:
        """The computation that an attribute names."""
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else None


@dataclass(frozen=True)
class Collective:
    """Exchanges of one kind between the devices of groups."""

    kind: str
    bytes: int  # on each device: of the result of an all-gather, else of the operand
    group: tuple[int, ...]  # devices of the first group, as places in the mesh's flat order
    times: int


@dataclass
class Module:
    """The computations of a program, by name."""

    entry: str
    computations: dict[str, list[Instruction]]
    devices: int
    trips: tuple[int, ...] = ()  # of loops without a known end: of outermost ones, of those within, ...
    _found: dict[str, Collective] = field(default_factory=dict)
    _traffic: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @cached_property
    def collectives(self) -> list[Collective]:
        """All exchanges of one run of the program."""
        self._visit(self.entry, 1, self.trips)
        return list(self._found.values())

    @cached_property
    def traffic(self) -> float:
        """Bytes that one run reads from and writes to the device's main memory."""
        _ = self.collectives  # one visit finds both
        return sum(self._traffic.values())

    def _visit(self, name: str, times: int, trips: tuple[int, ...], inside: bool = False) -> None:
        types = {i.name: i.type for i in self.computations[name]}
        for instruction in self.computations[name]:
            kind = instruction.opcode.removesuffix("-start")
            if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"  # how the TPU's compiler writes one
            if kind in KINDS:
                self._exchange(instruction, kind, types, times)
            if instruction.opcode == "while":
                known = self._length(instruction)
                count, inner = (known, trips) if known is not None else ((trips or (1,))[0], trips[1:])
                self._visit(str(instruction.called("body")), times * count, inner)
            elif instruction.opcode == "conditional":
                for branch in re.findall(
                    r"%?([\w.\-]+)", "".join(re.findall(r"computations?=\{?([^}=]*)", instruction.attributes))
                ):
                    if branch in self.computations:
                        self._visit(branch, times, trips)
            elif instruction.opcode in ("fusion", "call", "async-start"):
                called = instruction.called("calls") or instruction.called("to_apply")
                if called is not None:
                    self._visit(called, times, trips, inside=inside or instruction.opcode == "fusion")
            if not inside:
                self._traffic[instruction.opcode] += times * self._moved(instruction, types)

    def _exchange(self, instruction: Instruction, kind: str, types: dict[str, str], times: int) -> None:
        """Notes a collective. One that is split into start, middle and end has one channel in all of these."""
        group = group_of(instruction.attributes, self.devices)
        if len(group) < 2:
            return
        size = sum(size_of(types.get(name, "")) for name in instruction.operands)
        channel = re.search(r"channel_id=(\d+)", instruction.attributes)
        key = channel[1] if channel else instruction.name
        before = self._found.get(key)
        times = max(times, before.times if before else 0)
        self._found[key] = Collective(kind, size * (len(group) if kind == "all-gather" else 1), group, times)

    def _length(self, loop: Instruction) -> int | None:
        """How often a loop runs: from the compiler's note, or a condition that compares a counter with a constant."""
        if found := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes):
            return int(found[1])
        lines = self.computations[str(loop.called("condition"))]
        counts = [i for i in lines if i.opcode == "constant" and i.type.startswith(("s32[]", "u32[]"))]
        compared = [i for i in lines if i.opcode == "compare" and "direction=LT" in i.attributes]
        simple = {"parameter", "constant", "get-tuple-element", "compare"}
        if len(counts) == len(compared) == 1 and {i.opcode for i in lines} <= simple:
            return int(counts[0].operands[0])
        return None

    def _moved(self, instruction: Instruction, types: dict[str, str]) -> float:
        """Bytes that an instruction reads and writes in main memory."""
        name = instruction.opcode
        if name in FREE or name in ("while", "conditional", "call") or DONE.search(name):
            return 0.0
        if name == "dynamic-slice" or name == "slice":
            return 2.0 * size_of(instruction.type, main=True)
        if name == "dynamic-update-slice":
            return 2.0 * size_of(types.get(instruction.operands[1], ""), main=True)
        if name in ("copy-start", "slice-start"):  # to or from fast memory: its result is (to, from, ...)
            parts = shapes(instruction.type)
            moved = min((_bytes(kind, sizes) for kind, sizes, _ in parts[:2]), default=0)
            return float(moved * sum(not fast for *_, fast in parts[:2]))
        if name == "fusion":
            return self._fused(instruction, types)
        read = sum(size_of(types.get(operand, ""), main=True) for operand in instruction.operands)
        return float(read + size_of(instruction.type, main=True))

    def _fused(self, fusion: Instruction, types: dict[str, str]) -> float:
        """A fusion's operands and results; of one that is only sliced, or updated in place, the slice."""
        name = str(fusion.called("calls"))
        lines = self.computations[name]
        inner, total = {i.name: i for i in lines}, 0.0
        for parameter in (i for i in lines if i.opcode == "parameter"):
            given = size_of(types.get(fusion.operands[int(parameter.operands[0])], ""), main=True)
            total += min(given, self._read(name, parameter)) if given else 0
        root = next(i for i in lines if i.root)
        written = [inner[name] for name in root.operands] if root.opcode == "tuple" else [root]
        for line, (kind, sizes, fast) in zip(written, shapes(fusion.type), strict=False):
            if not fast:
                update = line.opcode == "dynamic-update-slice"
                total += size_of(inner[line.operands[1]].type) if update else _bytes(kind, sizes)
        return total

    def _read(self, computation: str, value: Instruction) -> float:
        """Bytes of a value that a fused computation reads: what it slices out of it, or all of it."""
        found = 0.0
        for line in self.computations[computation]:
            if value.name not in line.operands:
                continue
            first = line.operands[0] == value.name
            if line.opcode in ("dynamic-slice", "slice") and first:
                found += size_of(line.type)
            elif line.opcode == "bitcast":
                found += self._read(computation, line)
            elif line.opcode == "fusion":
                name, place = str(line.called("calls")), line.operands.index(value.name)
                inside = (i for i in self.computations[name] if i.opcode == "parameter" and int(i.operands[0]) == place)
                found += self._read(name, next(inside))
            elif not (line.opcode == "dynamic-update-slice" and first):
                return size_of(value.type)
        return min(found, size_of(value.type))


def parse(text: str, devices: int, trips: Sequence[int] = ()) -> Module:
    """The module of `compiled.as_text()`."""
    computations: dict[str, list[Instruction]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith((" ", "HloModule")):
            first, *rest = line.split()
            name = (rest[0] if first == "ENTRY" else first).lstrip("%").split("(")[0]
            entry = name if first == "ENTRY" else entry
            lines = computations.setdefault(name, [])
        elif line.startswith("  ") and " = " in line:
            lines.append(_instruction(line.strip()))
    return Module(entry, computations, devices, tuple(trips))


def _instruction(line: str) -> Instruction:
    root = line.startswith("ROOT ")
    name, rest = line.removeprefix("ROOT ").split(" = ", 1)
    end = _closing(rest) + 1 if rest.startswith("(") else rest.index(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    opcode, rest = rest[: rest.index("(")], rest[rest.index("(") :]
    end = _closing(rest)
    inner = re.sub(r"/\*.*?\*/", "", rest[1:end])
    operands = re.findall(r"%([\w.\-]+)", inner) or re.findall(r"^\s*([\w.\-]+)\s*$", inner)
    return Instruction(name.lstrip("%"), kind, opcode, tuple(operands), rest[end + 1 :], root)


def _closing(text: str) -> int:
    """Where the parenthesis that `text` begins with is closed."""
    depth = 0
    for found in re.finditer(r"[()]", text):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.start()
    raise ValueError(f"no closing parenthesis: {text[:80]}")


def shapes(kind: str) -> list[tuple[str, tuple[int, ...], bool]]:
    """The arrays of a type: element type, sizes, and whether it lies in fast memory on the chip."""
    found = re.findall(r"([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?", kind)
    return [
        (name, tuple(map(int, filter(None, sizes.split(",")))), bool(re.search(r"S\([1-9]", layout)))
        for name, sizes, layout in found
    ]


def size_of(kind: str, *, main: bool = False) -> int:
    """Bytes of a type; with `main` only of arrays in main memory."""
    return sum(_bytes(name, sizes) for name, sizes, fast in shapes(kind) if not (main and fast))


def _bytes(name: str, sizes: tuple[int, ...]) -> int:
    if name not in BITS and (found := re.match(r"[a-z]+(\d+)", name)) is None:
        return 0
    bits = BITS[name] if name in BITS else int(found[1])  # type: ignore[index]
    return math.prod(sizes) * bits // 8


def group_of(attributes: str, devices: int) -> tuple[int, ...]:
    """The devices of a collective's first group: of lists, of an iota, or of named axes of a mesh."""
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", attributes):
        sizes = [(name, int(size)) for name, size in re.findall(r"'(\w+)'=(\d+)", found[1])]
        places = np.arange(math.prod(size for _, size in sizes)).reshape([size for _, size in sizes])
        within = tuple(slice(None) if f"'{name}'" in found[2] else 0 for name, _ in sizes)
        return tuple(map(int, np.ravel(places[within])))
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        sizes_of = list(map(int, found[3].split(",")))
        places = np.arange(math.prod(sizes_of)).reshape(sizes_of)
        if found[4]:
            places = places.transpose(list(map(int, found[4].split(","))))
        return tuple(map(int, places.reshape(int(found[1]), int(found[2]))[0]))
    if found := re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}", attributes):
        return tuple(map(int, found[1].split(",")))
    return tuple(range(devices))
