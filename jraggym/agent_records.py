"""Episodes of agents as process data: what was asked, what was proposed, and what each proposal would do."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence

from jraggym.agents.agent import Agent
from jraggym.agents.episode import Episode, episode_from_json
from jraggym.data.process import ProcessRecord, Provenance
from jraggym.data.process.record import messages_text
from jraggym.environment import outcome, wants_retrieval
from jraggym.errors import InputError
from jraggym.labelling import Decision, Found
from jraggym.scripted import Lookup
from jraggym.types import Action, Example, Search, State, to_json


def agent_records(
    agent: Agent, example: Example, episode: Episode, max_turns: int, provenance: Provenance
) -> Iterator[ProcessRecord]:
    """One record for each turn on which the model was asked: the chat as it was shown, and its candidate replies.

    Halves of Unicode pairs, which a model can write and no tokenizer reads, become question marks.
    """
    text = json.dumps(to_json(episode), ensure_ascii=False).encode("utf-8", "replace").decode()
    trajectory = episode_from_json(json.loads(text)).trajectory
    final = outcome(trajectory.final, example)
    for number, step in enumerate(trajectory.steps):
        prompt = agent.prompt(step.state, _last(step.state, max_turns))
        assert not isinstance(prompt, Search), "a turn that needs no model is no step"
        yield ProcessRecord(
            example_id=example.id,
            step=number,
            state=step.state,
            prompt=messages_text(prompt),
            golds=example.answers,
            candidates=step.candidates,
            chosen=step.chosen,
            em=final["em"],
            f1=final["f1"],
            provenance=provenance,
        )


def agent_decisions(
    records: Sequence[ProcessRecord],
    *,
    agent: Agent,
    examples: Mapping[str, Example],
    max_turns: int,
    retriever: Lookup | None = None,
) -> list[Decision]:
    """The records with their examples and what their candidates would do; with a `retriever`, what searches bring.

    Raises InputError for a record of a question that is not in `examples`.
    """
    if other := sorted({record.example_id for record in records} - examples.keys()):
        raise InputError("records of other questions", got=", ".join(other[:3]), remedy="Name their evaluation.")
    actions = [_actions(agent, record, max_turns) for record in records]
    queries = [
        [a.query if isinstance(a, Search) and wants_retrieval(record.state, a, max_turns) else None for a in row]
        for record, row in zip(records, actions, strict=True)
    ]
    found: dict[str, Found] = {}
    if retriever is not None and (distinct := list(dict.fromkeys(q for row in queries for q in row if q is not None))):
        found = dict(zip(distinct, map(tuple, retriever(distinct)), strict=True))
    brought = [tuple(None if query is None else found.get(query, ()) for query in row) for row in queries]
    return [
        Decision(examples[record.example_id], record.state, row, hits)
        for record, row, hits in zip(records, actions, brought, strict=True)
    ]


def _actions(agent: Agent, record: ProcessRecord, max_turns: int) -> tuple[Action, ...]:
    last = _last(record.state, max_turns)
    return tuple(agent.parse(candidate.text, record.state, last) for candidate in record.candidates)


def _last(state: State, max_turns: int) -> bool:
    return len(state.turns) + 1 >= max_turns
