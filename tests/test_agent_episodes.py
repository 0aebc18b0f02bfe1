"""Episodes of agents: budgets, candidates, failures, costs, and independence of what runs beside them."""

import json
import zlib

import pytest
from agent_world import EXAMPLE, FOUND, QUESTION, Scripted, digest_model, look_up, replies

from jraggym.agent_episodes import AgentRules, run_agent
from jraggym.agents import AGENTS
from jraggym.agents.digests import Summariser
from jraggym.agents.episode import episode_from_json
from jraggym.agents.output import ANSWER, CLAIMS, QUERY, REASONING, format_output
from jraggym.chat_model import Completion, Reply
from jraggym.errors import InputError
from jraggym.types import Example, Malformed, Search, to_json


def search(query):
    return format_output({QUERY: query}, {REASONING: "hm"})


def answer(text):
    return format_output({ANSWER: text}, {REASONING: "hm"})


def reflect(text, query):
    return format_output({ANSWER: text, QUERY: query}, {REASONING: "hm", CLAIMS: "one"})


def react(model, rules=None, examples=(EXAMPLE,), retriever=look_up, **more):
    return run_agent(AGENTS["react"], model, examples, retriever, rules or AgentRules(4), **more)


# ---------------------------------------------------------------- one budget for all


def never_content(name):
    """The output of an agent that goes on for ever, and answers only when it must."""
    if name == "re2search":
        return reflect("x", "more")
    if name in ("react", "search_o1"):
        return search("more")
    return format_output({ANSWER: None if name == "ircot" else "x"}, {} if name == "direct" else {REASONING: "More."})


@pytest.mark.parametrize("budget", [1, 2, 4])
@pytest.mark.parametrize("name", AGENTS)
def test_no_agent_has_more_calls_or_searches_than_the_budget(name, budget):
    model = Scripted(lambda request: never_content(name))
    summariser = Summariser(digest_model())
    [episode] = run_agent(AGENTS[name], model, [EXAMPLE], look_up, AgentRules(budget), summariser=summariser)
    searches = {"direct": 0, "cot": 0, "rag": min(1, budget - 1)}.get(name, budget - 1)
    assert episode.costs.searches == searches
    assert episode.costs.calls == len(model.requests) <= budget
    assert episode.trajectory.final.done


def test_when_the_budget_ends_the_answer_so_far_is_the_answer():
    said = [reflect("John", "source of the Tarvan"), "no output at all", reflect(None, "Morn mayor"), "nothing again"]
    agent, rules = AGENTS["re2search"], AgentRules(4)
    [episode] = run_agent(agent, replies(*said), [EXAMPLE], look_up, rules, summariser=Summariser(digest_model()))
    final = episode.trajectory.final
    assert (final.answer, final.thought, final.truncated) == ("John", "hm\n\none", True)
    assert episode.costs.malformed == 2
    [episode] = react(replies(*[search("Morn mayor")] * 4))
    assert (episode.trajectory.final.answer, episode.trajectory.final.truncated) == (None, True)


# ---------------------------------------------------------------- candidates, scores, rewards


def test_the_critic_picks_and_only_the_chosen_search_is_carried_out():
    model = replies([search("source of the Tarvan"), search("Morn mayor")], [answer("x"), answer("Ada Lindqvist")])
    queries, asked = [], []

    def retriever(texts):
        queries.extend(texts)
        return look_up(texts)

    def scorer(pairs):
        asked.extend(pairs)
        return [[float("mayor" in text or "Ada" in text) for text in texts] for _, texts in pairs]

    rules = AgentRules(4, candidates=2, temperature=1.0, select="score")
    [episode] = react(model, rules, retriever=retriever, scorer=scorer)
    first, second = episode.trajectory.steps
    assert queries == ["Morn mayor"]
    assert (first.chosen, second.chosen) == (1, 1)
    assert [c.score for c in first.candidates] == [0.0, 1.0]
    assert [c.documents for c in first.candidates] == [(), ("morn",)]
    assert episode.trajectory.final.answer == "Ada Lindqvist"
    assert [prompt for prompt, _ in asked] == [request.messages for request in model.requests]
    assert all((r.candidates, r.temperature) == (2, 1.0) for r in model.requests)


def test_a_source_labels_all_candidates_with_what_each_would_find():
    decisions = []

    def source(asked):
        decisions.extend(asked)
        return [
            tuple(None if isinstance(a, Malformed) else 1.0 / (1 + i) for i, a in enumerate(d.actions)) for d in asked
        ]

    model = replies(["what?", search("source of the Tarvan"), search("Morn mayor"), answer("x")], [answer("y")] * 4)
    [episode] = react(model, AgentRules(4, candidates=4, select="reward"), source=source)
    step = episode.trajectory.steps[0]
    assert decisions[0].found == (None, FOUND["source of the Tarvan"], FOUND["Morn mayor"], None)
    assert decisions[0].example == EXAMPLE
    assert [c.reward for c in step.candidates] == [None, 1 / 2, 1 / 3, 1 / 4]
    assert step.chosen == 1
    assert [c.documents for c in step.candidates] == [(), ("tarvan",), ("morn",), ()]
    assert episode.costs.searches == 1


def test_majority_counts_actions_and_not_words_of_reasoning():
    ways = [answer("x"), "garbage", "garbage too", *(format_output({ANSWER: "y"}, {REASONING: t}) for t in "ab")]
    [episode] = react(replies(ways), AgentRules(4, candidates=5, select="majority"))
    assert episode.trajectory.final.answer == "y"


def test_equal_candidates_are_one_whatever_rounding_does_to_their_scores():
    rules = AgentRules(4, candidates=2, select="score")
    [episode] = react(replies([answer("x")] * 2), rules, scorer=lambda pairs: [[1.0, 1.0 + 1e-6]])
    assert episode.trajectory.steps[0].chosen == 0


# ---------------------------------------------------------------- failures


def test_a_failed_call_is_a_malformed_turn_and_is_counted():
    model = replies(Reply(error="429: slow down", cost=0.5), Reply(), answer("x"))
    [episode] = react(model)
    first, second = episode.trajectory.final.turns
    assert first.action == Malformed("the model failed: 429: slow down")
    assert second.action == Malformed("the model failed: no completion")
    assert (episode.costs.errors, episode.costs.calls, episode.costs.malformed) == (2, 3, 0)
    assert episode.costs.dollars == 0.75
    assert len(episode.trajectory.steps) == 1
    assert episode.trajectory.final.answer == "x"


def test_an_output_that_was_cut_off_says_so():
    [episode] = react(replies(Reply((Completion(search("x")[:-9], 5, cut=True),)), answer("x")))
    assert episode.trajectory.final.turns[0].action.reason.startswith("cut off at the token limit")


@pytest.mark.parametrize("fault", ["raises", "short"])
def test_a_failed_search_costs_its_turn_and_leaves_candidates_unlabelled(fault):
    def retriever(queries):
        if fault == "raises":
            raise OSError("disk")
        return []

    def source(decisions):
        return [(1.0,) for _ in decisions]

    [episode] = react(replies(search("x"), answer("y")), retriever=retriever, source=source)
    [turn] = episode.trajectory.final.turns
    assert ("disk" if fault == "raises" else "0 results for 1 queries") in turn.error
    assert turn.documents == ()
    assert [step.candidates[0].reward for step in episode.trajectory.steps] == [None, 1.0]
    assert episode.costs.searches == 1


def test_a_failed_digest_is_an_error_of_its_turn():
    model = replies(search(QUESTION), answer("x"))
    [episode] = run_agent(
        AGENTS["search_o1"], model, [EXAMPLE], look_up, AgentRules(4), summariser=Summariser(digest_model())
    )
    [turn] = episode.trajectory.final.turns
    assert turn.error == "the summariser failed: no digest of this"
    assert (turn.digest, turn.documents) == (None, FOUND[QUESTION])


@pytest.mark.parametrize(
    ("name", "rules", "says"),
    [
        ("search_o1", {}, "summariser"),
        ("react", {"select": "score"}, "scorer"),
        ("react", {"select": "reward"}, "source"),
    ],
)
def test_what_is_missing_is_named(name, rules, says):
    with pytest.raises(InputError, match=says):
        run_agent(AGENTS[name], replies(), [EXAMPLE], look_up, AgentRules(**rules))


@pytest.mark.parametrize("wrong", [{"max_turns": 0}, {"candidates": 0}, {"slots": 0}, {"select": "best"}])
def test_rules_that_cannot_be_are_refused(wrong):
    with pytest.raises(InputError):
        AgentRules(**wrong)


# ---------------------------------------------------------------- many together


def erratic(request):
    """K outputs that depend on the request alone: searches, answers, and what is neither."""
    texts = [search("Morn mayor"), search("source of the Tarvan"), answer("x"), answer("Morn"), "?"]
    key = zlib.crc32(repr((request.messages, request.seed)).encode())
    return [texts[(key >> 3 * i) % len(texts)] for i in range(request.candidates)]


EXAMPLES = [*(Example(f"e{i}", f"what is thing {i}", ("x",)) for i in range(9)), EXAMPLE, EXAMPLE]


@pytest.mark.parametrize("select", ["first", "random", "majority"])
def test_an_episode_does_not_depend_on_what_runs_beside_it(select):
    def rules(**more):
        return AgentRules(5, candidates=3, select=select, seed=7, **more)

    together = react(Scripted(erratic), rules(), EXAMPLES)
    assert len({len(e.trajectory.final.turns) for e in together}) > 1, "they should differ in length"
    assert react(Scripted(erratic), rules(slots=2), EXAMPLES) == together
    for example, episode in zip(EXAMPLES[:-1], together, strict=False):
        assert react(Scripted(erratic), rules(), [example]) == [episode]
    assert react(Scripted(erratic), AgentRules(5, candidates=3, select=select, seed=8), EXAMPLES) != together
    assert together[-1] != together[-2], "two episodes of one example draw apart"


def test_open_episodes_step_in_one_batch_and_ended_ones_are_handed_out_at_once():
    model = Scripted(lambda r: answer("x") if "Morn mayor" in r.messages[1].content else search("Morn mayor"))
    ended, reported, batches = {}, [], []

    def retriever(queries):
        batches.append(list(queries))
        return look_up(queries)

    found = react(
        model, AgentRules(4, slots=4), EXAMPLES[:6], retriever, report=reported.append, done=ended.__setitem__
    )
    assert [len(batch) for batch in model.batches] == [4, 4, 2, 2]
    assert batches == [["Morn mayor"]] * 2, "equal queries are searched once"
    assert reported == [0, 4, 4, 6]
    assert [ended[i] for i in range(6)] == found
    assert len({request.seed for request in model.batches[0]}) == 4


def test_an_episode_survives_json():
    [episode] = react(replies([search("Morn mayor"), "?"], [answer("x"), answer("y")]), AgentRules(4, candidates=2))
    assert episode_from_json(json.loads(json.dumps(to_json(episode)))) == episode
    for wrong in ([], {"trajectory": {}}, {"trajectory": {}, "costs": {"calls": 1}}):
        with pytest.raises(InputError):
            episode_from_json(wrong)


def test_the_answer_so_far_survives_json():
    [episode] = run_agent(
        AGENTS["re2search"],
        replies(reflect("x", "Morn mayor"), reflect("y", None)),
        [EXAMPLE],
        look_up,
        AgentRules(4),
        summariser=Summariser(digest_model()),
    )
    again = episode_from_json(json.loads(json.dumps(to_json(episode))))
    action = again.trajectory.final.turns[0].action
    assert isinstance(action, Search)
    assert (action.so_far, again.trajectory.final.turns[0].digest) == ("x", "The mayor is Ada Lindqvist.")
