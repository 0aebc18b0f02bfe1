"""Whole traces of each agent, written by hand: prompts, queries, documents, digests and stop."""

import pytest
from agent_world import EXAMPLE, QUESTION, TRACES, digest_model, look_up, replies

from jraggym.agent_episodes import AgentRules, run_agent
from jraggym.agents import AGENTS, COMPONENTS
from jraggym.agents.digests import Summariser
from jraggym.agents.output import CLAIMS, REASONING
from jraggym.agents.prompts import DOCUMENTS, HISTORY
from jraggym.types import Search

MAX_TURNS = 4
# RAG-Gym, table 1
TABLE = """\
                         direct cot rag react search_o1 re2search
answer generation        x      x   x   x     x         x
question reasoning       -      x   x   x     x         x
retrieval augmentation   -      -   x   x     x         x
query generation         -      -   -   x     x         x
document summarization   -      -   -   -     x         x
reasoning reflection     -      -   -   -     -         x"""


def play(name):
    """The requests of an agent whose model says what the trace says, those of its summariser, and its episode."""
    model, reader = replies(*said(name)), digest_model()
    agent = AGENTS[name]
    summariser = Summariser(reader) if agent.digests else None
    [episode] = run_agent(agent, model, [EXAMPLE], look_up, AgentRules(MAX_TURNS), summariser=summariser)
    return model.requests, reader.requests, episode


def said(name):
    blocks = (TRACES / f"{name}.txt").read_text(encoding="utf-8").split("== ")
    return [block.partition("\n")[2].rstrip("\n") for block in blocks if block.startswith("reply\n")]


def trace(name):
    """The episode in the form of the files: a system prompt stands where it is another one than before."""
    requests, reading, episode = play(name)
    calls, final = iter(zip(requests, said(name), strict=True)), episode.trajectory.final
    read, before = iter(reading), {"actor": "", "summariser": ""}
    decided = {len(step.state.turns) for step in episode.trajectory.steps}
    lines = []
    for number in range(len(final.turns) + (not final.truncated)):
        if number in decided:
            request, reply = next(calls)
            lines += [*asked("actor", request, before), "== reply", reply]
        if number < len(final.turns):
            turn = final.turns[number]
            lines += turn_lines(turn)
            if turn.digest:
                lines += [*asked("summariser", next(read), before), f"== digest: {turn.digest}"]
    return "\n".join([*lines, f"== answer: {final.answer}\n"])


def asked(who, request, before):
    """The prompt, with the system's part where it is new."""
    system, user = request.messages
    assert (system.role, user.role) == ("system", "user")
    new, before[who] = system.content != before[who], system.content
    return [*([f"== {who}, system", system.content] if new else []), f"== {who}, user", user.content]


def turn_lines(turn):
    if not isinstance(turn.action, Search):
        return [f"== malformed: {turn.action.reason}"]
    so_far = f" (so far: {turn.action.so_far})" if turn.action.so_far else ""
    found = " ".join(document.id for document in turn.documents) or "(nothing)"
    return [f"== search: {turn.action.query}{so_far}", f"== found: {found}"]


@pytest.mark.parametrize("name", AGENTS)
def test_the_whole_trace_is_the_one_written_by_hand(name):
    assert trace(name) == (TRACES / f"{name}.txt").read_text(encoding="utf-8")


def test_the_agents_are_made_of_the_components_of_the_paper():
    header, *rows = TABLE.splitlines()
    for column, name in enumerate(header.split()):
        marked = {row[:25].strip() for row in rows if row[25:].split()[column] == "x"}
        assert AGENTS[name].components == marked, name
    assert tuple(row[:25].strip() for row in rows) == COMPONENTS


@pytest.mark.parametrize("name", AGENTS)
def test_each_component_is_seen_in_the_trace(name):
    requests, _, episode = play(name)
    final, components = episode.trajectory.final, AGENTS[name].components
    searches = [turn for turn in final.turns if isinstance(turn.action, Search)]
    decided = {len(step.state.turns) for step in episode.trajectory.steps}
    system, users = requests[0].messages[0].content, [request.messages[1].content for request in requests]
    seen = {
        "answer generation": final.answer is not None,
        "question reasoning": f"### {REASONING}" in system,
        "retrieval augmentation": bool(searches) and (f"### {DOCUMENTS}" in users[-1] or f"### {HISTORY}" in users[-1]),
        "query generation": any(
            final.turns[number].action.query.startswith(QUESTION) is False
            for number in decided
            if number < len(final.turns) and isinstance(final.turns[number].action, Search)
        ),
        "document summarization": any(turn.digest for turn in searches),
        "reasoning reflection": f"### {CLAIMS}" in system,
    }
    assert {component for component, present in seen.items() if present} == components


def test_costs_are_those_of_the_trace():
    requests, _, episode = play("react")
    costs = episode.costs
    assert (costs.calls, costs.candidates, costs.malformed, costs.errors) == (4, 4, 1, 0)
    assert (costs.searches, costs.digests, costs.dollars) == (2, 0, 1.0)
    assert costs.tokens == sum(len(text.split()) for text in said("react"))
    assert costs.prompt_tokens == sum(len(m.content.split()) for request in requests for m in request.messages)
    *_, episode = play("search_o1")
    assert (episode.costs.calls, episode.costs.digests, episode.costs.dollars) == (3, 2, 1.25)
