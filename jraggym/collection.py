"""Collecting process data: rollouts whose every state keeps its K labelled candidates."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from jax import Array

from jraggym.data.process import ChunkStore, ProcessRecord, Provenance
from jraggym.environment import outcome
from jraggym.hosts import agreed, lead, share
from jraggym.preemption import Preempted, should_stop
from jraggym.rollout import Policy, Rollout
from jraggym.text.rendering import render
from jraggym.types import Example, Trajectory


def collect(
    rollout: Rollout,
    policy: Policy,
    examples: Sequence[Example],
    key: Array,
    store: ChunkStore,
    provenance: Provenance,
    *,
    chunk: int,
    report: Callable[[int], None] | None = None,
) -> Iterator[ProcessRecord]:
    """Runs the questions in chunks, skipping the chunks that `store` already holds; gives all records in order.

    The rollout's rules must have a judge. A chunk is a pure function of (policy, key, questions), so a killed
    collection that is called again ends with the same records. Only the end of a chunk leaves rows of the rollout's
    batch idle: take some batches a chunk. `report` gets the number of questions done, from a callback of the rollout.
    """
    starts = range(0, len(examples), chunk)
    done = agreed(store.done())
    for number, start in enumerate(starts):
        part = examples[start : start + chunk]
        if should_stop():
            raise Preempted
        if number not in done:
            found = rollout.run(policy, part, key, report=partial(_report, start, report))
            records = [
                record
                for example, trajectory in zip(part, found, strict=True)
                for record in records_of(example, trajectory, provenance, rollout.max_turns)
            ]
            if lead():
                store.write(number, [example.id for example in part], records)
        if report is not None:
            report(start + len(part))
    share(None)  # all is written
    return store.read_all(chunks=len(starts))


def _report(start: int, report: Callable[[int], None] | None, done: int) -> None:
    if report is not None:
        report(start + done)


def records_of(
    example: Example, trajectory: Trajectory, provenance: Provenance, max_turns: int
) -> Iterator[ProcessRecord]:
    """One self-contained record for each state of an episode."""
    final = outcome(trajectory.final, example)
    for number, step in enumerate(trajectory.steps):
        yield ProcessRecord(
            example_id=example.id,
            step=number,
            state=step.state,
            prompt="".join(render(step.state, max_turns)),
            golds=example.answers,
            candidates=step.candidates,
            chosen=step.chosen,
            em=final["em"],
            f1=final["f1"],
            provenance=provenance,
        )
