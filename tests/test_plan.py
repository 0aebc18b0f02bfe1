"""Scripted demonstrations and the oracle, played through the environment with a real retriever."""

import dataclasses
import random
from collections import Counter

import pytest

from jraggym.data.plan import FLAWLESS, Faults, Plan, demonstrate, oracle, plan_by_titles, progress
from jraggym.data.synthhop import make_world
from jraggym.data.synthhop.grammar import chains
from jraggym.environment import outcome, transition, wants_retrieval
from jraggym.retrieval.corpus import Corpus
from jraggym.retrieval.hybrid import HybridRetriever
from jraggym.types import Answer, Document, Example, Malformed, Search, State, Turn

MAX_TURNS = 5
PLAN = Plan(("a r", "b s"), ("r b", "s c"), ("b", "c"), (("zed",), ("yon",)), "c", "s")
EXAMPLE = Example("e", "What is the s of the r of a?", ("c",), "2-hop", ("A", "B"))
A, B, OTHER = Document("A", "a", "r b"), Document("B", "b", "s c"), Document("Z", "zed", "unrelated")
# every group is prone to the fault, and commits it whenever it can
ALWAYS = {
    kind: dataclasses.replace(FLAWLESS, **{kind: 1.0, f"{kind}_groups": 1.0})
    for kind in ("premature", "redundant", "astray")
}


@pytest.fixture(scope="module")
def world():
    return make_world("test", 0)


@pytest.fixture(scope="module")
def search(world):
    """The retriever, asked one query at a time and remembering what it found."""
    retriever = HybridRetriever(Corpus.from_documents(world.documents), k=2)
    kept: dict[str, tuple[Document, ...]] = {}

    def find(query):
        if query not in kept:
            kept[query] = retriever([query])[0]
        return kept[query]

    return find


def play(example, act, search):
    """One episode; gives the final state and its actions."""
    state, actions = State(example.question), []
    while not state.done:
        action = act(state, len(state.turns) + 1 == MAX_TURNS)
        actions.append(action)
        found = search(action.query) if wants_retrieval(state, action, MAX_TURNS) else ()
        state = transition(state, action, found, max_turns=MAX_TURNS)
    return state, actions


def demonstrations(world, search, faults, seed=0):
    """Every question once: (example, plan, final state, actions)."""
    for example in world.examples:
        plan, rng = world.plans[example.id], random.Random(f"{seed}/{example.id}")

        def act(state, last, plan=plan, rng=rng):
            return demonstrate(plan, state, faults, rng, last_turn=last)

        yield example, plan, *play(example, act, search)


def em(runs):
    scores = [outcome(state, example)["em"] for example, _, state, _ in runs]
    return sum(scores) / len(scores)


def faults_of(plan, actions):
    """The kinds of fault in an episode, told from its actions alone."""
    queries = [action.query for action in actions if isinstance(action, Search)]
    if any(count > 1 for query, count in Counter(queries).items() if query in plan.queries):
        yield "redundant"
    if set(queries) - set(plan.queries):
        yield "astray"
    if set(plan.queries) - set(queries) and len(actions) < MAX_TURNS:
        yield "premature"


def state_after(*turns):
    return State(EXAMPLE.question, tuple(Turn(Search(query), documents) for query, documents in turns))


# ---------------------------------------------------------------- whole episodes


def test_flawless_demonstrations_solve_everything(world, search):
    runs = list(demonstrations(world, search, FLAWLESS))
    assert em(runs) == 1.0
    for _, plan, state, actions in runs:
        assert not list(faults_of(plan, actions))
        assert len(state.turns) == len(set(plan.queries))
        assert not state.truncated


def test_default_faults_cost_accuracy_and_every_kind_occurs(world, search):
    runs = list(demonstrations(world, search, Faults()))
    assert 0.4 < em(runs) < 0.85
    kinds = Counter(kind for _, plan, _, actions in runs for kind in faults_of(plan, actions))
    assert {kind for kind, count in kinds.items() if count >= 0.01 * len(runs)} == {"premature", "redundant", "astray"}
    assert all(state.done and not state.truncated for _, _, state, _ in runs), "a demonstration ends with an answer"


def test_faults_belong_to_groups(world, search):
    """A question of a group that is not prone to a fault never shows it."""
    faults = Faults()
    for _, plan, _, actions in demonstrations(world, search, faults):
        for kind in faults_of(plan, actions):
            assert faults.prone(kind, plan.group) > 0, f"{plan.group} is not prone to {kind}"


def test_the_same_generator_gives_the_same_demonstrations(world, search):
    one, two, other = ([a for *_, a in demonstrations(world, search, Faults(), seed)] for seed in (0, 0, 1))
    assert one == two
    assert one != other


def test_the_oracle_is_near_perfect_with_a_retriever_and_knows_nothing_without(world, search):
    runs = [
        (e, None, *play(e, lambda state, last, e=e: oracle(e, world.plans[e.id], state), search))
        for e in world.examples
    ]
    assert em(runs) > 0.98
    blind = [
        (e, None, *play(e, lambda state, last, e=e: oracle(e, world.plans[e.id], state), lambda query: ()))
        for e in world.examples
    ]
    assert em(blind) == 0.0
    assert {state.answer for _, _, state, _ in blind} == {"unknown"}


# ---------------------------------------------------------------- one action


def act(state, faults=FLAWLESS, *, last=False, plan=PLAN):
    return demonstrate(plan, state, faults, random.Random(0), last_turn=last)


def test_the_script_follows_the_plan():
    first = act(state_after())
    second = act(state_after(("a r", (A,))))
    third = act(state_after(("a r", (A,)), ("b s", (B,))))
    assert (first, first.thought) == (Search("a r"), "")
    assert (second, second.thought) == (Search("b s"), "r b")
    assert (third, third.thought) == (Answer("c"), "s c")


def test_progress_counts_the_plan_in_order():
    assert progress(PLAN, state_after()) == 0
    assert progress(PLAN, state_after(("b s", ()))) == 0, "the second search alone is no progress"
    assert progress(PLAN, state_after(("zed", ()), ("a r", ()))) == 1
    assert progress(PLAN, state_after(("b s", ()), ("a r", ()))) == 2
    assert progress(PLAN, State("q", (Turn(Malformed("empty")), Turn(Search("a r"))))) == 1


def test_a_search_that_comes_twice_in_a_plan_is_made_once():
    plan = Plan(("a r", "b s", "a r"), ("r b", "s a", "r b"), ("b", "a", "b"), ((), (), ()), "b", "r")
    assert progress(plan, state_after(("a r", ()))) == 1
    assert act(state_after(("a r", ()), ("b s", ())), plan=plan) == Answer("b")


def test_no_fault_before_the_first_search():
    for faults in ALWAYS.values():
        assert act(state_after(), faults) == Search("a r")


def test_premature():
    found = act(state_after(("a r", (A,))), ALWAYS["premature"])
    assert (found, found.thought) == (Answer("b"), "r b")


def test_redundant_once():
    once = state_after(("a r", (A,)))
    assert act(once, ALWAYS["redundant"]) == Search("a r")
    assert act(state_after(("a r", (A,)), ("a r", (A,))), ALWAYS["redundant"]) == Search("b s")


def test_astray_asks_for_somebody_else_on_the_page():
    found = act(state_after(("a r", (A,))), ALWAYS["astray"])
    assert (found, found.thought) == (Search("zed"), "r b")
    assert act(state_after(("a r", (A,)), ("zed", (OTHER,))), ALWAYS["astray"]) == Search("zed")
    nobody = dataclasses.replace(PLAN, detours=((), ()))
    assert act(state_after(("a r", (A,))), ALWAYS["astray"], plan=nobody) == Search("b s")


def test_a_plan_by_titles_searches_the_named_one_first_and_is_led_astray_beside():
    example = Example("e", "Who is mayor where the Tarvan flows?", ("Ada",), "bridge", ("Morn (town)", "Tarvan"))
    plan = plan_by_titles(example, ["Tarvan", "Sea (album)", "Morn (town)", "Hill"])
    assert plan.queries == ("Tarvan", "Morn")
    assert plan.bridges == ("Morn", "Ada")
    assert plan.detours == (("Sea", "Hill"), ("Sea", "Hill"))
    assert plan_by_titles(example).detours == ((), ())


def test_no_fault_once_everything_is_found():
    complete = state_after(("a r", (A,)), ("b s", (B, OTHER)))
    for faults in ALWAYS.values():
        assert act(complete, faults) == Answer("c")


@pytest.mark.parametrize("faults", [FLAWLESS, *ALWAYS.values()])
def test_the_last_turn_answers_with_the_best_known(faults):
    assert act(state_after(("a r", (A, OTHER))), faults, last=True) == Answer("b")
    assert act(state_after(("a r", (A,)), ("b s", (B,))), faults, last=True) == Answer("c")
    assert isinstance(act(state_after(), faults, last=True), Answer)


# ---------------------------------------------------------------- proneness


def test_prone_is_the_share_inside_the_prone_groups_and_zero_outside():
    groups = [f"group {i}" for i in range(2000)]
    drawn = [Faults(premature=0.3, premature_groups=0.4).prone("premature", group) for group in groups]
    assert set(drawn) == {0.0, 0.3}
    assert 0.36 < sum(p > 0 for p in drawn) / len(drawn) < 0.44
    assert {Faults(astray=0.3, astray_groups=1.0).prone("astray", group) for group in groups} == {0.3}
    assert {Faults(astray=0.3, astray_groups=0.0).prone("astray", group) for group in groups} == {0.0}


def test_a_group_may_be_prone_to_one_fault_and_not_to_another():
    groups = ["/".join(chain) for hops in (1, 2, 3) for chain in chains(hops)]
    faults = Faults(premature_groups=0.5, redundant_groups=0.5)
    pairs = {(faults.prone("premature", group) > 0, faults.prone("redundant", group) > 0) for group in groups}
    assert len(pairs) == 4


# ---------------------------------------------------------------- oracle


def test_oracle():
    assert oracle(EXAMPLE, PLAN, state_after()) == Search("a r")
    assert oracle(EXAMPLE, PLAN, state_after(("a r", (A,)))) == Search("b s")
    assert oracle(EXAMPLE, PLAN, state_after(("a r", (A,)), ("b s", (B,)))) == Answer("c")
    assert oracle(EXAMPLE, PLAN, state_after(("a r", (B,)), ("b s", (A,)))) == Answer("c"), "who found it is no matter"


@pytest.mark.parametrize(("first", "second"), [((A,), ()), ((), (B,)), ((OTHER,), (OTHER, B)), ((), ())])
def test_oracle_does_not_know_what_was_not_retrieved(first, second):
    assert oracle(EXAMPLE, PLAN, state_after(("a r", first), ("b s", second))) == Answer("unknown")
