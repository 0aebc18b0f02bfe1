"""Episodes of an agent that any chat model plays: all open ones go forward together, a turn at a time.

    open states ──prompt──> chats ──one batch──> outputs ──parse──> K candidates each
                                                                      │ scores of a critic
         turn with documents (and digest) <──one batch── searches <───┤ rewards of a source
                                                                      └ one is executed

What an episode becomes depends on the seed and its example, not on what runs beside it.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from jraggym.agents import Agent
from jraggym.agents.digests import Digest, Summariser
from jraggym.agents.episode import Costs, Episode
from jraggym.chat_model import ChatModel, Message, Reply, Request
from jraggym.environment import transition, wants_retrieval
from jraggym.episodes import episode_names
from jraggym.errors import InputError
from jraggym.labelling import Decision, Found, RewardSource
from jraggym.preemption import stop_if_asked
from jraggym.retrieval.guard import guarded
from jraggym.scripted import Lookup
from jraggym.selection import SELECTORS
from jraggym.text.actions import format_action
from jraggym.types import Action, Candidate, Example, Malformed, Search, State, Step, Trajectory

Messages = tuple[Message, ...]
# Scores the candidate texts of each prompt: a critic
Scorer = Callable[[Sequence[tuple[Messages, tuple[str, ...]]]], list[list[float]]]


@dataclass(frozen=True, slots=True)
class AgentRules:
    """How episodes run: budget, sampling, and which of the K candidates of a turn is executed (selection.SELECTORS).

    `slots` is the most episodes that are open at a time (None: all); when one ends, the next begins. `timeout` is the
    retriever's, in seconds for a whole batch. Raises InputError for what cannot be.
    """

    max_turns: int = 10
    candidates: int = 1
    temperature: float = 0.0
    max_tokens: int = 2_048
    select: str = "first"
    seed: int = 0
    timeout: float = 60.0
    slots: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_turns", "candidates", "max_tokens", "slots"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise InputError(f"{name} must be at least 1", got=value, remedy="Use 1 or more.")
        if self.select not in SELECTORS:
            raise InputError("unknown selector", got=repr(self.select), remedy=f"Use one of {', '.join(SELECTORS)}.")


@dataclass
class _Run:
    """An episode in the making, and its present turn."""

    index: int
    name: str
    example: Example
    state: State
    steps: list[Step] = field(default_factory=list)
    costs: Costs = field(default_factory=Costs)
    prompt: Messages = ()
    candidates: tuple[Candidate, ...] = ()  # what the model proposes: nothing where it failed or was not asked
    actions: tuple[Action, ...] = ()  # those of the candidates, or the one that comes in their place
    found: tuple[Found, ...] = ()  # what each action's search brought, None for what was not carried out
    error: str | None = None  # of the retriever


def run_agent(
    agent: Agent,
    model: ChatModel,
    examples: Sequence[Example],
    retriever: Lookup,
    rules: AgentRules,
    *,
    summariser: Summariser | None = None,
    scorer: Scorer | None = None,
    source: RewardSource | None = None,
    starts: Sequence[State] | None = None,
    report: Callable[[int], None] | None = None,
    done: Callable[[int, Episode], None] | None = None,
) -> list[Episode]:
    """Runs the agent on each example, and gives their episodes in order.

    Episodes go on from `starts`, by default from the questions. With a `source` all candidates' searches are carried
    out and labelled, without one only the executed one's. `done` gets each episode's number and the episode as soon as
    it ends, `report` the number of ended ones after every turn. A failed call of the model is a malformed turn, a
    failed search or digest an error of its turn: all are counted.

    Raises:
      InputError: the agent reads digests and there is no summariser, or what `rules.select` goes by is missing.
    """
    _check(agent, rules, summariser, scorer, source)
    names = episode_names(examples)
    starts = [State(example.question) for example in examples] if starts is None else starts
    both = zip(names, examples, starts, strict=True)
    runs = [_Run(i, name, example, state) for i, (name, example, state) in enumerate(both)]
    ended: dict[int, Episode] = {}
    while opened := list(islice((run for run in runs if run.index not in ended), rules.slots)):
        stop_if_asked()
        _propose(agent, model, opened, rules)
        if scorer is not None:
            _score(scorer, opened)
        if source is None:
            chosen = [_select(run, rules) for run in opened]
            _search(retriever, opened, chosen, rules)
        else:
            _search(retriever, opened, [None] * len(opened), rules)
            _label(source, opened)
            chosen = [_select(run, rules) for run in opened]
        _execute(agent, opened, chosen, rules, summariser)
        for run in opened:
            if run.state.done:
                ended[run.index] = Episode(Trajectory(run.example.id, tuple(run.steps), run.state), run.costs)
                if done is not None:
                    done(run.index, ended[run.index])
        if report is not None:
            report(len(ended))
    return [ended[run.index] for run in runs]


def _check(agent: Agent, rules: AgentRules, summariser: Any, scorer: Any, source: Any) -> None:
    for needed, by, given in (
        (agent.digests, f"agent {agent.name!r} needs a summariser", summariser),
        (rules.select == "score", "selection by score needs a scorer", scorer),
        (rules.select == "reward", "selection by reward needs a source", source),
    ):
        if needed and given is None:
            raise InputError(by, got="none", remedy="Give one.")


def _propose(agent: Agent, model: ChatModel, runs: Sequence[_Run], rules: AgentRules) -> None:
    """Asks for the candidates of each run's turn, and reads them."""
    asking = []
    for run in runs:
        run.candidates, run.actions, run.found, run.error = (), (), (), None
        prompt = agent.prompt(run.state, _last(run, rules))
        if isinstance(prompt, Search):
            run.actions = (prompt,)
        else:
            run.prompt = prompt
            asking.append(run)
    replies = model([_request(run, rules) for run in asking]) if asking else []
    for run, reply in zip(asking, replies, strict=True):
        _read(agent, run, reply, _last(run, rules))


def _last(run: _Run, rules: AgentRules) -> bool:
    return len(run.state.turns) + 1 >= rules.max_turns


def _request(run: _Run, rules: AgentRules) -> Request:
    seed = zlib.crc32(f"{rules.seed}/{run.name}/{len(run.state.turns)}".encode())
    return Request(run.prompt, rules.candidates, rules.temperature, rules.max_tokens, seed)


def _read(agent: Agent, run: _Run, reply: Reply, last: bool) -> None:
    actions: list[Action] = []
    for completion in reply.completions:
        action = agent.parse(completion.text, run.state, last)
        if completion.cut and isinstance(action, Malformed):
            action = Malformed(f"cut off at the token limit: {action.reason}")
        actions.append(action)
    run.candidates = tuple(Candidate(c.text, logprob=c.logprob) for c in reply.completions)
    failed = reply.error is not None or not actions
    run.costs = run.costs.plus(
        calls=1,
        candidates=len(actions),
        malformed=sum(isinstance(action, Malformed) for action in actions),
        errors=int(failed),
        prompt_tokens=reply.prompt_tokens,
        tokens=sum(completion.tokens for completion in reply.completions),
        dollars=reply.cost,
    )
    if failed:
        run.candidates, actions = (), [Malformed(f"the model failed: {reply.error or 'no completion'}")]
    run.actions = tuple(actions)


def _score(scorer: Scorer, runs: Sequence[_Run]) -> None:
    proposing = [run for run in runs if run.candidates]
    asked = [(run.prompt, tuple(candidate.text for candidate in run.candidates)) for run in proposing]
    for run, row in zip(proposing, scorer(asked) if asked else (), strict=True):
        run.candidates = tuple(replace(c, score=float(s)) for c, s in zip(run.candidates, row, strict=True))


def _search(retriever: Lookup, runs: Sequence[_Run], chosen: Sequence[int | None], rules: AgentRules) -> None:
    """Carries out the searches of each run's chosen action, of all its actions where None is chosen yet."""
    queries = [
        [_query(run, action, rules) if pick in (i, None) else None for i, action in enumerate(run.actions)]
        for run, pick in zip(runs, chosen, strict=True)
    ]
    distinct = list(dict.fromkeys(query for row in queries for query in row if query is not None))
    found, error = _retrieve(retriever, distinct, rules.timeout)
    for run, row in zip(runs, queries, strict=True):
        run.found = tuple(None if query is None else found.get(query, ()) for query in row)
        run.error = error if any(query is not None for query in row) else None
        if run.candidates:
            run.candidates = tuple(
                replace(candidate, documents=tuple(document.id for document in hits or ()))
                for candidate, hits in zip(run.candidates, run.found, strict=True)
            )


def _query(run: _Run, action: Action, rules: AgentRules) -> str | None:
    if isinstance(action, Search) and wants_retrieval(run.state, action, rules.max_turns):
        return action.query
    return None


def _retrieve(retriever: Lookup, queries: Sequence[str], timeout: float) -> tuple[dict[str, Found], str | None]:
    """What each query brings, and what went wrong if anything did."""
    if not queries:
        return {}, None
    found, error = guarded(lambda: [tuple(hits) for hits in retriever(queries)], timeout)
    if error is None and len(found) != len(queries):
        error = f"the retriever gave {len(found)} results for {len(queries)} queries"
    return ({}, error) if error is not None else (dict(zip(queries, found, strict=True)), None)


def _label(source: RewardSource, runs: Sequence[_Run]) -> None:
    """Rewards the candidates; where a search failed they stay unlabelled."""
    asked = [run for run in runs if run.candidates and run.error is None]
    decisions = [Decision(run.example, run.state, run.actions, run.found) for run in asked]
    for run, row in zip(asked, source(decisions) if decisions else (), strict=True):
        run.candidates = tuple(replace(c, reward=reward) for c, reward in zip(run.candidates, row, strict=True))


def _select(run: _Run, rules: AgentRules) -> int:
    if len(run.actions) == 1:
        return 0
    # Candidates are alike if they act alike, whatever they thought before; what is no action is like nothing else.
    acts = [
        c.text if isinstance(a, Malformed) else format_action(replace(a, thought=""))
        for c, a in zip(run.candidates, run.actions, strict=True)
    ]
    views = [replace(c, text=act) for c, act in zip(run.candidates, acts, strict=True)]
    rng = random.Random(f"{rules.seed}/{run.name}/{len(run.state.turns)}")
    chosen = run.candidates[SELECTORS[rules.select](views, rng)].text
    # Equal texts are one candidate. The first stands for all: their scores differ by rounding, which must not choose.
    return next(i for i, candidate in enumerate(run.candidates) if candidate.text == chosen)


def _execute(
    agent: Agent, runs: Sequence[_Run], chosen: Sequence[int], rules: AgentRules, summariser: Summariser | None
) -> None:
    """Moves each run on by the action that was chosen, with its documents and, for some agents, their digest."""
    digests: dict[int, Digest] = {}
    if agent.digests and summariser is not None:
        reading = [(run, pick) for run, pick in zip(runs, chosen, strict=True) if run.found[pick]]
        asked = [(run.state.question, _text(run.actions[i]), tuple(run.found[i] or ())) for run, i in reading]
        digests = dict(zip((run.index for run, _ in reading), summariser(asked), strict=True)) if asked else {}
    for run, pick in zip(runs, chosen, strict=True):
        if run.candidates:
            run.steps.append(Step(run.state, run.candidates, pick))
        hits = run.found[pick]
        digest = digests.get(run.index, Digest(None))
        error = None if hits is None else run.error
        if digest.error is not None:
            error = f"the summariser failed: {digest.error}"
        run.costs = run.costs.plus(
            searches=int(hits is not None),
            digests=int(run.index in digests),
            prompt_tokens=digest.prompt_tokens,
            tokens=digest.tokens,
            dollars=digest.cost,
        )
        run.state = transition(
            run.state, run.actions[pick], tuple(hits or ()), error, digest.text, max_turns=rules.max_turns
        )


def _text(action: Action) -> str:
    return action.query if isinstance(action, Search) else ""
