"""Floating-point operations of a program, counted from its jaxpr for all layers.

Products are counted, and nothing else: they are what a matrix unit's peak is about. A scan counts as often as it
runs; XLA's own `cost_analysis` counts its body once. A Pallas kernel counts as often as its grid has places, a
conditional with its dearest branch (what masks leave out of a kernel's grid is not counted, blocks that are half
masked are).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from jax.extend import core


def count_flops(program: Any, trips: Sequence[int] = ()) -> float:
    """FLOPs of a closed jaxpr over all devices.

    `trips` says how often loops without a known end run: the outermost ones trips[0] times, those within trips[1]
    times, deeper ones once.
    """
    return _count(program.jaxpr, tuple(trips))


def _count(jaxpr: Any, trips: tuple[int, ...]) -> float:
    return sum(_of(equation, trips) for equation in jaxpr.eqns)


def _of(equation: Any, trips: tuple[int, ...]) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        return _product(equation)
    if name == "conv_general_dilated":
        raise NotImplementedError("no model here has convolutions")
    if name == "scan":
        return params["length"] * _count(params["jaxpr"].jaxpr, trips)
    if name == "while":
        times, inner = (trips[0], trips[1:]) if trips else (1, ())
        return times * _count(params["body_jaxpr"].jaxpr, inner)
    if name == "cond":
        return max(_count(branch.jaxpr, trips) for branch in params["branches"])
    if name == "shard_map":  # its body is one device's part
        return params["mesh"].size * _count(_plain(params["jaxpr"]), trips)
    if name == "pallas_call":
        return math.prod(params["grid_mapping"].grid) * _count(_plain(params["jaxpr"]), trips)
    return sum(_count(inner, trips) for inner in _within(params))


def _product(equation: Any) -> float:
    """2 m n k, for each place of the batch axes."""
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)


def _within(params: dict[str, Any]) -> list[Any]:
    """The jaxprs among an equation's parameters: of jit, checkpoint, custom derivatives."""
    found = []
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, core.Jaxpr | core.ClosedJaxpr):
                found.append(_plain(item))
    return found


def _plain(jaxpr: Any) -> Any:
    return jaxpr.jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else jaxpr
