"""What lies in a device's memory while a program runs."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import jax
from jax.extend import core

from jraggym.planning.topologies import GIB


def bytes_on_device(tree: Any) -> int:
    """Bytes of abstract arrays on each device."""

    def size(leaf: Any) -> int:
        shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
        return math.prod(shape) * leaf.dtype.itemsize

    return sum(map(size, jax.tree.leaves(tree)))


def kept_for_backward(program: Any) -> int:
    """Bytes over all devices that the layers' forward pass leaves for the backward pass, from a closed jaxpr.

    They are what a scan writes and a scan that runs backwards reads; of several such pairs, the largest counts.
    """
    return _kept(program.jaxpr)


def _kept(jaxpr: Any) -> int:
    written = {out for e in jaxpr.eqns if e.primitive.name == "scan" for out in e.outvars[e.params["num_carry"] :]}
    most = 0
    for equation in jaxpr.eqns:
        params = equation.params
        if equation.primitive.name == "scan" and params["reverse"]:
            read = equation.invars[params["num_consts"] + params["num_carry"] :]
            most = max(most, sum(v.aval.size * v.aval.dtype.itemsize for v in read if _in(v, written)))
        inner = [v for value in params.values() for v in (value if isinstance(value, tuple | list) else (value,))]
        for value in inner:
            if isinstance(value, core.ClosedJaxpr | core.Jaxpr):
                most = max(most, _kept(value.jaxpr if isinstance(value, core.ClosedJaxpr) else value))
    return most


def _in(variable: Any, written: set[Any]) -> bool:
    return not isinstance(variable, core.Literal) and variable in written


def parts_of_memory(
    held: Mapping[str, Any], stats: Any, activations: int, cache: int, *, needed: float = 0.0
) -> dict[str, float]:
    """Bytes on each device by part; their sum is the peak.

    Args: held: what is in memory all the time, by name; stats: XLA's account of the program, or None for a refused one,
      of which the compiler said only how much is `needed`; activations, cache: what of its temporaries are kept
      activations, and keys and values.
    """
    parts: dict[str, float] = {name: float(bytes_on_device(tree)) for name, tree in held.items()}
    there = sum(parts.values())
    if stats is None:
        temporary, other = max(0.0, needed - there), 0.0
    else:
        # Arrays are padded to tiles, and results that replace no argument lie beside the arguments.
        temporary = float(stats.temp_size_in_bytes)
        other = max(0.0, stats.argument_size_in_bytes - there) + stats.generated_code_size_in_bytes
        other += max(0, stats.output_size_in_bytes - stats.alias_size_in_bytes)
    for name, size in (("activations", activations), ("KV cache", cache)):
        parts[name] = min(float(size), temporary)
        temporary -= parts[name]
    return {**parts, "temporaries": temporary + other}


def refusal(text: str, held: float) -> tuple[float, float] | None:
    """(bytes needed, bytes there) from the compiler's message that a program does not fit; None for another one.

    It tells of all that is needed, or of the temporaries alone, which come to the bytes `held` all the time.
    """
    size = r"([\d.]+)([KMGT]?)"
    everything = re.search(rf"Used {size} of {size} hbm", text)
    temporaries = re.search(rf"temporaries \({size}\) exceeds available HBM \({size}\)", text)
    if (found := everything or temporaries) is None:
        return None
    unit = {"": 1, "K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}
    needed, there = float(found[1]) * unit[found[2]], float(found[3]) * unit[found[4]]
    return needed + (0.0 if everything else held), there
