"""Exchanges of one SFT step on 1, 2, 4 and 8 fake CPU devices with as many rows each, counted in the compiled program.

    python tests/benchmarks/weak_scaling.py

data      every device holds all weights: all gradients are exchanged, those of the prompts' pass and those of the
          branches' pass each, on any number of devices
fsdp      each holds a part: weights are gathered before use, by either pass and again for the gradients, which are
          added up; as many bytes on any number of devices
tensor    each layer's partial products are added up; rows are not split, so that bytes grow with them
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from jraggym.models.decoder import DecoderConfig, specs
from jraggym.planning.abstract import abstract_weights, empty_batch, spread
from jraggym.planning.hlo import Collective, parse
from jraggym.sharding import MESH_AXES, make_mesh
from jraggym.steps import Network, sft
from jraggym.training import Optimization, Step, abstract_state

CONFIG = DecoderConfig(vocab=256, model=64, layers=2, query_heads=8, kv_heads=8, head_dim=8, feed_forward=128)


def exchanges(axis: str, devices: int, rows: int = 8) -> list[Collective]:
    """Those of a step with `rows` rows for each device, on a mesh that is `devices` long in one axis."""
    mesh = make_mesh(*(devices if name == axis else 1 for name in MESH_AXES))
    weights, optimizer = abstract_weights(specs(CONFIG), mesh), Optimization(10, matrix_rate=0.0).build()
    batch = spread(empty_batch(rows * devices, prompt=64, action=32, candidates=2), mesh)
    step, state = Step(sft(Network(CONFIG, mesh=mesh)), optimizer), abstract_state(weights, optimizer)
    compiled = step.program(state).trace(state, batch, weights, 0).lower().compile()
    return parse(compiled.as_text(), devices).collectives


def table(axis: str, sizes: Sequence[int] = (1, 2, 4, 8)) -> list[dict[str, Any]]:
    """A row for each number of devices: how many exchanges, and their bytes on a device, by kind."""
    found = []
    for devices in sizes:
        made = exchanges(axis, devices)
        kinds = sorted({c.kind for c in made})
        total = {kind: sum(c.times * c.bytes for c in made if c.kind == kind) for kind in kinds}
        count = {kind: sum(c.times for c in made if c.kind == kind) for kind in kinds}
        found.append({"devices": devices, "count": count, "bytes": total})
    return found


def weight_bytes() -> int:
    """Of all weights in float32."""
    leaves = jax.tree.leaves(specs(CONFIG), is_leaf=lambda s: hasattr(s, "axes"))
    return sum(4 * int(jnp.prod(jnp.array(spec.shape))) for spec in leaves)


def main(sizes: tuple[int, ...] = (1, 2, 4, 8)) -> None:
    """Prints the table; `sizes` are numbers of devices."""
    jax.config.update("jax_num_cpu_devices", max(sizes))
    print(f"weights: {weight_bytes() / 1e6:.3f} MB; {dataclasses.asdict(CONFIG)}\n")
    print("| axis | devices | exchanges | MB on a device |\n|---|---|---|---|")
    for axis in MESH_AXES:
        for row in table(axis, sizes):
            counts = ", ".join(f"{n} {kind}" for kind, n in row["count"].items()) or "none"
            made = ", ".join(f"{size / 1e6:.3f} {kind}" for kind, size in row["bytes"].items()) or "0"
            print(f"| {axis} | {row['devices']} | {counts} | {made} |")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
