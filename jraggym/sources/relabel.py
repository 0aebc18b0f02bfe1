"""Putting a source's rewards on collected data: records -> decisions -> rewards -> records.

A source that looks at what searches bring needs `decisions`, for which searches that kept no documents are carried
out again; the others are content with `bare_decisions`, which a record alone gives.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from jraggym.data.process import ChunkStore, ProcessRecord
from jraggym.environment import wants_retrieval
from jraggym.errors import InputError
from jraggym.labelling import Decision, Found, RewardSource
from jraggym.preemption import stop_if_asked
from jraggym.retrieval.hybrid import Retriever
from jraggym.text.actions import parse_action
from jraggym.types import Candidate, Example, Search

Decide = Callable[[Sequence[ProcessRecord]], list[Decision]]


def bare_decisions(records: Sequence[ProcessRecord]) -> list[Decision]:
    """What the records tell by themselves: nothing of supporting documents, nor of what a search would bring.

    Raises InputError for chats, whose candidates only their agent can read (agent_records.agent_decisions).
    """
    if any(record.messages is not None for record in records):
        remedy = "Name their evaluation (eval.agreement --episodes), or compare datasets of train.label."
        raise InputError("candidates of an agent are no actions in tags", got="chats", remedy=remedy)
    return [
        Decision(
            Example(record.example_id, record.question, record.golds),
            record.state,
            tuple(parse_action(candidate.text) for candidate in record.candidates),
            (None,) * len(record.candidates),
        )
        for record in records
    ]


def decisions(
    records: Sequence[ProcessRecord], examples: Mapping[str, Example], retriever: Retriever, max_turns: int
) -> list[Decision]:
    """The records with their examples, and the documents of every search that is carried out within `max_turns`.

    `retriever` is the one of the collection. Raises InputError for a record of a question that is not in `examples`,
    or of another one under its id, and for a document that is not in the corpus.
    """
    found = []
    for record, bare in zip(records, bare_decisions(records), strict=True):
        example = examples.get(record.example_id)
        if example is None or example.question != record.question:
            got = f"record {record.id!r}: {record.question!r}"
            raise InputError("process data of other questions", got=got, remedy="Name the world it was collected in.")
        documents = [
            _kept(candidate, retriever)
            if isinstance(action, Search) and wants_retrieval(bare.state, action, max_turns)
            else None
            for candidate, action in zip(record.candidates, bare.actions, strict=True)
        ]
        found.append(replace(bare, example=example, found=tuple(documents)))
    return _searched(found, retriever)


def relabel(
    records: Iterable[ProcessRecord],
    source: RewardSource,
    store: ChunkStore,
    *,
    name: str,
    decide: Decide = bare_decisions,
    chunk: int = 64,
    report: Callable[[int], None] | None = None,
) -> Iterator[ProcessRecord]:
    """The records with the source's rewards instead of theirs, and `name` as the judge of their provenance.

    Goes in chunks of `chunk` questions and skips those that `store` already holds, so that it can be killed and called
    again. All records of a question must stand together. `report` gets the number of questions done.
    """
    questions = [list(group) for _, group in itertools.groupby(records, lambda record: record.example_id)]
    done, starts = store.done(), range(0, len(questions), chunk)
    for number, start in enumerate(starts):
        part = questions[start : start + chunk]
        stop_if_asked()
        if number not in done:
            labelled = _labelled([record for group in part for record in group], source, decide, name)
            store.write(number, [group[0].example_id for group in part], labelled)
        if report is not None:
            report(start + len(part))
    return store.read_all(chunks=len(starts))


def _labelled(records: Sequence[ProcessRecord], source: RewardSource, decide: Decide, name: str) -> list[ProcessRecord]:
    rewards = source(decide(records))
    return [
        replace(
            record,
            candidates=tuple(replace(c, reward=r) for c, r in zip(record.candidates, row, strict=True)),
            provenance=replace(record.provenance, judge=name),
        )
        for record, row in zip(records, rewards, strict=True)
    ]


def _kept(candidate: Candidate, retriever: Retriever) -> Found:
    corpus = retriever.corpus
    return tuple(corpus[corpus.position(id)] for id in candidate.documents)


def _searched(found: list[Decision], retriever: Retriever) -> list[Decision]:
    """Carries out what kept no documents: searches of candidates that were not executed, and failed ones."""
    missing = [
        (i, j, action.query)
        for i, decision in enumerate(found)
        for j, (action, documents) in enumerate(zip(decision.actions, decision.found, strict=True))
        if documents == () and isinstance(action, Search)
    ]
    if not missing:
        return found
    brought = retriever([query for _, _, query in missing])
    for (i, j, _), documents in zip(missing, brought, strict=True):
        rows = list(found[i].found)
        rows[j] = documents
        found[i] = replace(found[i], found=tuple(rows))
    return found
