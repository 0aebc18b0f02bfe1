"""The chat model as a judge: what it is shown, how strictly it is read, and what a failure leaves."""

import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jraggym.chat_model import Completion, Reply
from jraggym.errors import InputError
from jraggym.labelling import Decision
from jraggym.sources.llm_judge import LlmJudge, Tally, parse_ranking, read_tally, tallied
from jraggym.types import Answer, Document, Example, Malformed, Search, State, Turn

EXAMPLE = Example("e", "Who?", ("Marnos", "the Marnos"), "2-hop", ("A",))
PAPER = Document("A", "Page", "Words of the page.")
STATE = State("Who?", (Turn(Search("first", "SECRET"), (PAPER,)), Turn(Search("more"), (PAPER,), digest="In short.")))
# from best to worst for the scripted judge, which ranks by the words it is shown
ACTIONS = (Answer("a", "SECRET"), Answer("b"), Search("c"), Search("d"))
DECISION = Decision(EXAMPLE, STATE, ACTIONS, (None,) * 4)


def block(ranking):
    return f'So be it.\n```json\n{{"ranked_indices": {ranking}}}\n```'


def listed(request):
    """The actions as the judge sees them, by index."""
    lines = request.messages[1].content.split("### Actions\n")[1].splitlines()
    assert [line.split()[0] for line in lines] == [f"[{i}]" for i in range(len(lines))]
    return [line.split(" ", 1)[1] for line in lines]


class Scripted:
    """Ranks by the alphabet of the shown words; `faults` are what it says instead, one for each call."""

    def __init__(self, *faults):
        self.faults, self.calls = list(faults), []

    def __call__(self, requests):
        self.calls.append(list(requests))
        fault = self.faults.pop(0) if self.faults else None
        return [self.answer(request) if fault is None else fault for request in requests]

    def answer(self, request):
        shown = listed(request)
        text = block(sorted(range(len(shown)), key=shown.__getitem__))
        return Reply((Completion(text),), cost=0.25)


def said(text):
    return Reply((Completion(text),), cost=0.25)


def test_ranks_become_rewards():
    model = Scripted()
    judge = LlmJudge(model)
    assert judge([DECISION]) == [(1.0, 1 / 2, 1 / 3, 1 / 4)]
    assert (judge.tally.decisions, judge.tally.requests, judge.tally.unlabelled) == (1, 1, 0)
    assert judge.tally.cost == 0.25
    assert judge([]) == []
    assert len(model.calls) == 1, "nothing to ask, nobody asked"


@settings(deadline=None, max_examples=24)
@given(st.permutations(range(6)), st.integers(0, 3))
def test_neither_order_nor_repetition_of_candidates_changes_a_reward(order, seed):
    actions = (*ACTIONS, Answer("b", "thought otherwise"), Malformed("empty"))
    rewards = (1.0, 1 / 2, 1 / 3, 1 / 4, 1 / 2, 1 / 5)
    decision = replace(DECISION, actions=tuple(actions[i] for i in order), found=(None,) * 6)
    model = Scripted()
    assert LlmJudge(model, seed=seed)([decision]) == [tuple(rewards[i] for i in order)]
    (request,) = model.calls[0]
    assert sorted(listed(request)) == ["Answer: a", "Answer: b", "Query: c", "Query: d"], "equal ones once"
    again = Scripted()
    LlmJudge(again, seed=seed)([replace(DECISION, actions=actions, found=(None,) * 6)])
    assert again.calls == model.calls, "what is asked does not depend on the order of the candidates"


def test_the_order_shown_is_shuffled_by_seed():
    orders = set()
    for seed in range(40):
        model = Scripted()
        LlmJudge(model, seed=seed)([DECISION])
        orders.add(tuple(listed(model.calls[0][0])))
    assert len(orders) > 12
    for shown in ("Answer: a", "Query: d"):
        assert {order.index(shown) for order in orders} == {0, 1, 2, 3}


def test_what_the_judge_sees():
    model = Scripted()
    LlmJudge(model)([DECISION])
    (request,) = model.calls[0]
    content = request.messages[1].content
    history = "Query: first\n(Page) Words of the page.\n\nQuery: more\nIn short.\n\n"
    assert content.startswith(f"### Question\nWho?\n\n### History\n{history}### Actions\n[0] ")
    assert "SECRET" not in content, "the reasoning is not shown"
    assert "Marnos" not in content, "nor the gold answer"
    assert [m.role for m in request.messages] == ["system", "user"]
    assert all(word in request.messages[0].content for word in ("Sufficiency", "Utility", "Redundancy"))
    shown = Scripted()
    LlmJudge(shown, show_gold=True)([replace(DECISION, state=State("Who?"))])
    content = shown.calls[0][0].messages[1].content
    assert (
        "### History\nNothing was searched yet.\n\n### Right answer (not known to the agent)\nMarnos or the" in content
    )


BAD = {
    "no block": '{"ranked_indices": [0, 1, 2, 3]}',
    "two blocks": block([0, 1, 2, 3]) + block([0, 1, 2, 3]),
    "not json": "```json\n{'ranked_indices': [0, 1, 2, 3]}\n```",
    "trailing comma": '```json\n{"ranked_indices": [0, 1, 2, 3],}\n```',
    "not closed": '```json\n{"ranked_indices": [0, 1, 2, 3]}',
    "more fields": '```json\n{"ranked_indices": [0, 1, 2, 3], "why": ""}\n```',
    "field twice": '```json\n{"ranked_indices": [3, 2, 1, 0], "ranked_indices": [0, 1, 2, 3]}\n```',
    "a list": "```json\n[0, 1, 2, 3]\n```",
    "pairs": '```json\n[["ranked_indices", [0, 1, 2, 3]]]\n```',
    "one missing": block([0, 1, 2]),
    "one twice": block([0, 1, 2, 2]),
    "one too many": block([0, 1, 2, 3, 4]),
    "from one": block([1, 2, 3, 4]),
    "texts": block('["0", "1", "2", "3"]'),
    "floats": block([0.0, 1.0, 2.0, 3.0]),
    "truth": block("[false, true, 2, 3]"),
    "nested": block("[[0], 1, 2, 3]"),
    "null": block("null"),
    "deep": "```json\n" + "[" * 100_000 + "\n```",
    "code": '```json\n__import__("os").getcwd()\n```',
}


@pytest.mark.parametrize("text", BAD.values(), ids=BAD)
def test_what_is_no_ranking_is_refused(text):
    with pytest.raises(InputError, match="Write one ```json block with a permutation of 0 to 3"):
        parse_ranking(text, 4)


def test_a_ranking_is_read():
    assert parse_ranking(block([2, 0, 1]), 3) == [2, 0, 1]


@pytest.mark.parametrize(
    "fault", [said("hm"), said(BAD["one twice"]), Reply(error="429"), Reply()], ids=["text", "twice", "error", "empty"]
)
def test_a_failed_ranking_is_asked_for_again_in_another_order(fault):
    model = Scripted(fault, fault)
    judge = LlmJudge(model, retries=2)
    assert judge([DECISION]) == [(1.0, 1 / 2, 1 / 3, 1 / 4)]
    asked = [call[0] for call in model.calls]
    assert len(asked) == 3
    assert len({tuple(listed(request)) for request in asked}) > 1
    assert [request.seed for request in asked] == [0, 1, 2]
    assert (judge.tally.requests, judge.tally.unlabelled, len(judge.tally.faults)) == (3, 0, 2)


def test_a_ranking_that_keeps_failing_leaves_its_decision_unlabelled_and_counted():
    other = replace(DECISION, example=replace(EXAMPLE, id="f"), state=State("Whose?"))

    class Half(Scripted):
        def answer(self, request):
            return Reply(error="500") if "Whose?" in request.messages[1].content else super().answer(request)

    model = Half()
    judge = LlmJudge(model, retries=1)
    assert judge([other, DECISION]) == [(None,) * 4, (1.0, 1 / 2, 1 / 3, 1 / 4)]
    assert [len(call) for call in model.calls] == [2, 1], "only the failed one is asked again"
    assert (judge.tally.decisions, judge.tally.requests, judge.tally.unlabelled) == (2, 3, 1)
    assert "500" in judge.tally.faults[0]


def test_tallies_are_kept_and_a_repeated_call_counts_once(tmp_path):
    path, other = tmp_path / "kept" / "tally.json", replace(DECISION, example=replace(EXAMPLE, id="f"))
    assert read_tally(path) == Tally()
    judge = LlmJudge(Scripted(said("hm")))
    assert tallied(judge, path)([DECISION]) == [(1.0, 1 / 2, 1 / 3, 1 / 4)]
    first = read_tally(path)
    assert (first.decisions, first.requests, first.unlabelled, first.cost, len(first.faults)) == (1, 2, 0, 0.5, 1)
    assert judge.tally == Tally()
    source = tallied(LlmJudge(Scripted()), path)
    source([other])
    assert read_tally(path) == Tally(2, 3, 0, 0.75, first.faults)
    source([DECISION])
    source([])
    assert read_tally(path) == Tally(2, 2, 0, 0.5, [])
    path.write_text('{"e/2": {"asked": 1}}')
    with pytest.raises(InputError, match="no tally of a judge"):
        read_tally(path)


def test_what_needs_no_ranking_is_not_asked():
    model = Scripted()
    judge = LlmJudge(model)
    cases = {
        (Search("c"), Search("c", "twin")): (1.0, 1.0),
        (Malformed("empty"), Search("c")): (1 / 2, 1.0),
        (Malformed("empty"), Malformed("no tag")): (None, None),
    }
    for actions, rewards in cases.items():
        assert judge([Decision(EXAMPLE, STATE, actions, (None, None))]) == [rewards]
    assert model.calls == []
    assert judge.tally.decisions == 0


def test_every_permutation_is_undone():
    """Whatever order is shown, rewards go back to the candidates that were meant."""
    for ranking in itertools.permutations(range(4)):
        model = Scripted(said(block(list(ranking))))
        (rewards,) = LlmJudge(model, seed=5)([DECISION])
        shown = listed(model.calls[0][0])
        expected = {shown[index]: 1 / (1 + rank) for rank, index in enumerate(ranking)}
        assert dict(zip(("Answer: a", "Answer: b", "Query: c", "Query: d"), rewards, strict=True)) == expected
