"""What an experiment needs of a TPU slice: python -m train.plan dpo-llama-8b --topology v5p:4x4x4

The experiments are those of the other entries, such as dpo-llama-8b for `train.dpo llama-8b`, with all their fields.
Their real programs are compiled for the slice on this machine, which needs no TPU: pip install 'jraggym[plan]'.
Exit code 0: all programs fit; 1: one does not, and what to change is said; 2: the input is wrong.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import tyro
from tqdm import tqdm

from jraggym.errors import exit_on_input_error
from jraggym.planning.costs import ASSUMPTIONS
from jraggym.planning.plan import HELD, Plan, best, fitted, plan, search
from jraggym.planning.programs import left_out
from jraggym.planning.topologies import GIB, Topology, parse_topology
from train import collect, critic, dpo, grpo, ppo, sft

ENTRIES = {"sft": sft, "dpo": dpo, "critic": critic, "grpo": grpo, "ppo": ppo, "collect": collect}
EXPERIMENTS = {
    f"{entry}-{name}": (about, experiment)
    for entry, module in ENTRIES.items()
    for name, (about, experiment) in module.EXPERIMENTS.items()
}
HEAD = (
    "| experiment | program | topology | data x fsdp x tensor | remat | parts | held | activations | KV cache |"
    " temporaries | margin | PFLOP | exchanges (GB) | step at best, in turn (s) | MFU | compiled (s) |"
)

if TYPE_CHECKING:
    Planned = Any
else:
    Planned = tyro.extras.subcommand_type_from_defaults(
        {name: experiment for name, (_, experiment) in EXPERIMENTS.items()},
        {name: about for name, (about, _) in EXPERIMENTS.items()},
        prefix_names=False,
    )


@dataclass(frozen=True)
class Job:
    """What is planned, and where it would run."""

    experiment: Planned
    topology: tuple[str, ...]
    """v5e:8x8, v5p:4x4x4, v6e:16x16, or several slices as 2xv5p:4x4x4; each one named is planned."""
    search: bool = False
    """Try mesh shapes, rematerialisation and micro-batches, and name the best that fits. Ctrl-C ends it."""
    only: str | None = None
    """Only the program whose name begins so, such as step, policy or rollout."""
    markdown: bool = False
    """One row of a table for each program."""


def main() -> None:
    jax.config.update("jax_platforms", "cpu")
    with exit_on_input_error():
        config = (tyro.conf.CascadeSubcommandArgs, tyro.conf.OmitSubcommandPrefixes)
        job = tyro.cli(Job, description=__doc__, config=config)
        name = next(word for word in sys.argv[1:] if word in EXPERIMENTS)
        everything = [parse_topology(text) for text in job.topology]
        if job.markdown:
            print(f"{HEAD}\n|{'---|' * (HEAD.count('|') - 1)}")
        found = [run(job, name, topology) for topology in everything]
        if job.markdown:
            print(f"\n{ASSUMPTIONS}\n")
        print(f"Not planned: {left_out(job.experiment)}.")
    if not all(found):
        raise SystemExit(1)


def run(job: Job, name: str, topology: Topology) -> bool:
    """Plans and prints; returns whether everything fits."""
    if job.search:
        chosen = searched(job, name, topology)
        if chosen is None:
            print(f"{name} on {topology}: nothing that was tried fits. Use a larger topology or --lora.rank 16.")
            return False
        show(job, chosen)
        return True
    fits = True
    for one in plan(fitted(job.experiment, topology), topology, name=name, only=job.only):
        show(job, [one])
        fits = fits and one.fits
    return fits


def searched(job: Job, name: str, topology: Topology) -> list[Plan] | None:
    """The plans of the best choice; those that were tried are listed on the way."""
    bar, tried = tqdm(desc=f"{name} on {topology}", file=sys.stderr), []

    def report(done: int, total: int, plans: list[Plan]) -> None:
        bar.total = total
        bar.update(done - bar.n)
        bar.write("; ".join(line(one) for one in plans), file=sys.stderr)

    try:
        for plans in search(job.experiment, topology, name=name, only=job.only, report=report):
            tried.append(plans)
    except KeyboardInterrupt:
        bar.write(f"ended after {len(tried)} choices", file=sys.stderr)
    bar.close()
    return best(tried)


def show(job: Job, plans: Sequence[Plan]) -> None:
    """Prints plans, as a row of the table or in full."""
    for one in plans:
        print(row(one) if job.markdown else text(one), flush=True)


def mesh_of(one: Plan) -> str:
    return f"{one.devices.data} x {one.devices.fsdp} x {one.devices.tensor}"


def line(one: Plan) -> str:
    """A plan in some words."""
    where = f"{mesh_of(one)}, remat {one.remat}, parts {one.parts}, {one.program}"
    if one.times is None or not one.fits:
        return f"{where}: {one.message or f'lacks {-one.margin / GIB:.1f} GiB'}"
    return f"{where}: {one.margin / GIB:.1f} GiB free, {one.times.best:.2f} to {one.times.in_turn:.2f} s"


def row(one: Plan) -> str:
    """A row under HEAD; memory in GiB."""
    held = sum(size for name, size in one.memory.items() if name in HELD)
    memory = [held, *(one.memory[name] for name in ("activations", "KV cache", "temporaries"))]
    cells = [one.experiment, one.program, str(one.topology), mesh_of(one), one.remat, one.parts]
    cells += [f"{size / GIB:.1f}" for size in memory]
    cells.append(f"{one.margin / GIB:.1f}" if one.fits else f"**refused: {one.message or f'{one.margin / GIB:.1f}'}**")
    if one.times is None:
        return "| " + " | ".join(map(str, [*cells, *[""] * 4, f"{one.seconds:.0f}"])) + " |"
    exchanges = sum(size for _, size in one.by_kind().values())
    low, high = one.times.mfu
    cells += [f"{one.flops / 1e15:.1f}", f"{exchanges / 1e9:.1f}", f"{one.times.best:.2f}, {one.times.in_turn:.2f}"]
    return "| " + " | ".join(map(str, [*cells, f"{low:.0%} to {high:.0%}", f"{one.seconds:.0f}"])) + " |"


def text(one: Plan) -> str:
    """The whole plan."""
    chip, lines = one.topology.chip, [f"{one.experiment}, {one.program}, on {one.topology} ({one.topology.size} chips)"]
    sizes = one.devices
    lines.append(
        f"  {one.flag}.data {sizes.data} {one.flag}.fsdp {sizes.fsdp} {one.flag}.tensor {sizes.tensor}"
        f" --settings.model.remat {one.remat} --parts {one.parts}   compiled in {one.seconds:.0f} s"
    )
    verdict = "fits" if one.fits else f"DOES NOT FIT: {one.message or 'what stays in memory beside it is too much'}"
    lines.append(f"  {verdict}; HBM of a chip {chip.hbm / GIB:.2f} GiB, free {one.margin / GIB:.2f} GiB")
    lines += [f"    {name:16s}{size / GIB:8.2f} GiB" for name, size in one.memory.items() if size >= GIB / 200]
    if not one.fits:
        lines.append("  change: " + "; or ".join(one.remedies()))
    if one.times is None:
        return "\n".join(lines)
    needed = f"{one.useful / max(one.flops, 1):.0%} of them not repeated"
    lines.append(f"  {one.flops / 1e15:.2f} PFLOP ({needed}), {one.tokens:,} tokens")
    lines.append(f"  each chip: {one.traffic / 1e9:.1f} GB through HBM")
    lines += [f"    {count:6d} x {kind:20s}{size / 1e9:8.2f} GB" for kind, (count, size) in one.by_kind().items()]
    times, (low, high) = one.times, one.times.mfu
    lines.append(
        f"  roofline: products {times.products:.3f} s, memory {times.memory:.3f} s, exchange {times.exchange:.3f} s"
        f"; step {times.best:.3f} s at best, {times.in_turn:.3f} s in turn; MFU {low:.0%} to {high:.0%}"
    )
    lines.append(f"  {ASSUMPTIONS}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
