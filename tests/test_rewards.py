"""Rewards of whole episodes against hand-worked values, malformed episodes included."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jraggym import metrics
from jraggym.errors import InputError
from jraggym.protocols import PROTOCOLS
from jraggym.rewards import REWARDS, Finished, r1_searcher_stage2, search_r1_format
from jraggym.rewards.answer import cover_em, em, has_answer, hotpot_f1, plain_f1, set_f1, true_false_f1
from jraggym.rewards.combine import all_of, by_mode, failed, gate, or_else, scaled, staged, total
from jraggym.rewards.evidence import gold_in_observations, support_f1, support_recall
from jraggym.rewards.form import (
    balanced,
    ended,
    free_of,
    in_order,
    occurs,
    searched,
    short_answer,
    valid_sequence,
)
from jraggym.types import Document, Example, Segment

PROMPT, MODEL, OBS, INVALID = Segment.PROMPT, Segment.MODEL, Segment.OBSERVATION, Segment.INVALID
T, S = "<think>t</think>", "<search>q</search>"
GOLD = Example("x", "Who?", ("Ada Lind", "Lind"), support=("d1", "d2"))


def finished(protocol, *turns, example=GOLD, ended=True, found="of Morn", documents=(), may_search=True):
    """The model's turns, with an observation behind each that ends with a search and a message behind the others."""
    protocol, pieces = PROTOCOLS[protocol], [(PROMPT, f"such as {T}<answer>Lind</answer>")]
    for i, turn in enumerate(turns):
        pieces.append((MODEL, turn))
        if i < len(turns) - 1:
            pieces.append((OBS, found) if turn.endswith(protocol.search[1]) else (INVALID, "No <answer>Lind</answer>."))
    return Finished(protocol, example, tuple(pieces), ended, documents, may_search)


def right(text):
    return f"<answer>{text}</answer>"


def boxed(text):
    return rf"<answer> It is \[ \boxed{{{text}}} \] </answer>"


# ---------------------------------------------------------------- published rewards


@pytest.mark.parametrize(
    ("turns", "over", "value"),
    [
        ([T + boxed("Ada Lind")], {}, 1.0),
        ([T + S, T + boxed("Lind")], {}, 1.0),  # any gold counts
        ([T + S, boxed("Ada Lind")], {}, 1.0),  # one thought is enough
        ([f"{T} so {S}", f" {T} and {boxed('the LIND!')} ."], {}, 1.0),
        ([T + boxed("Ada Byron")], {}, 0.5),  # one of two words, of two
        ([T + boxed("Ada of Lind")], {}, 0.8),  # 2 * 2 / (3 + 2)
        ([T + boxed("Byron")], {}, 0.1),
        ([T + boxed("")], {}, 0.1),
        ([boxed("Ada Lind")], {}, 0.0),  # no thought
        ([T + right("Ada Lind")], {}, 0.0),  # nothing boxed
        ([T + boxed("Lind") + boxed("Lind")], {}, 0.0),
        ([T + S], {}, 0.0),  # no answer, and the prompt's example is none
        ([T + S, T + boxed("Lind")], {"ended": False}, 0.0),
        ([T + boxed("Byron")], {"ended": False}, 0.0),
        (["<think>" + boxed("Lind")], {}, 0.0),
        ([T + "<result>Lind</result>" + boxed("Lind")], {}, 0.0),  # an observation that the model wrote
        ([""], {}, 0.0),
        ([], {}, 0.0),
    ],
)
def test_research_rl(turns, over, value):
    assert REWARDS["research_rl"](finished("research_rl", *turns, **over)) == pytest.approx(value, abs=1e-12)
    paper = REWARDS["research_rl_paper"]  # who ended the episode does not matter
    assert paper(finished("research_rl", *turns, **over)) == REWARDS["research_rl"](finished("research_rl", *turns))


def test_a_search_without_a_result_is_bad_form():
    pieces = ((MODEL, T + S), (MODEL, T + boxed("Lind")))
    assert REWARDS["research_rl"](Finished(PROTOCOLS["research_rl"], GOLD, pieces, True)) == 0


# turns, found, then EM, version 0.3 with lambda_r = 0, and with lambda_r = 0.1
SEARCH_R1 = [
    ([T + right("Ada Lind")], "", 1, 1.0, 1.0),
    ([T + S, T + right("lind")], "of Lind", 1, 1.0, 1.0),
    ([right("Ada Lind")], "", 1, 0.8, 0.8),  # right in bad form
    ([T + S, right("Lind")], "of Lind", 1, 0.8, 0.8),
    ([T + "hm", T + right("Lind")], "", 1, 0.8, 0.8),  # an invalid action on the way
    ([T + right("Lind") + " done"], "", 1, 0.8, 0.8),
    ([T + right("Byron")], "", 0, 0.2, 0.2),
    ([T + S, T + right("Byron")], "of Morn", 0, 0.2, 0.2),
    ([T + S, T + right("Byron")], "Ada LIND, of Morn", 0, 0.2, 0.3),
    ([T + S, T + right("Byron")], "Lindgren", 0, 0.2, 0.2),  # whole words
    ([T + S, T + right("")], "of Lind", 0, 0.2, 0.3),
    ([T + S, T + right("Ada or Lind")], "of Lind", 0, 0.2, 0.3),  # exact match, and not F1
    ([T + S, right("Byron")], "of Lind", 0, 0.1, 0.1),  # evidence does not count in bad form
    ([right("Byron")], "", 0, 0.1, 0.1),
    (["<think>t" + right("Byron")], "", 0, 0.1, 0.1),
    ([T + S], "", 0, 0.0, 0.0),  # the prompt's example is no answer
    ([T + "hm", "hm"], "", 0, 0.0, 0.0),  # and that of an invalid-action message neither
    (["<answer>Lind"], "", 0, 0.0, 0.0),
    ([T + S, "no idea"], "<answer>Lind</answer>", 0, 0.0, 0.0),  # nor an answer in an observation
    ([""], "", 0, 0.0, 0.0),
    ([], "", 0, 0.0, 0.0),
]


@pytest.mark.parametrize(("turns", "found", "exact", "plain", "retrieval"), SEARCH_R1)
def test_search_r1(turns, found, exact, plain, retrieval):
    episode = finished("search_r1", *turns, found=found)
    assert REWARDS["search_r1_em"](episode) == exact
    assert REWARDS["search_r1_format"](episode) == pytest.approx(plain, abs=1e-12)
    assert search_r1_format(lambda_r=0.1)(episode) == pytest.approx(retrieval, abs=1e-12)


def test_search_r1_with_other_weights():
    how = search_r1_format(lambda_s=0.3, lambda_f=0.05, lambda_r=0.2)
    episodes = [[T + S, T + right("x")], [right("Lind")], [right("x")]]
    values = [how(finished("search_r1", *turns, found="of Lind")) for turns in episodes]
    np.testing.assert_allclose(values, [0.5, 0.7, 0.05])


Q = "<|begin_of_query|>q<|end_of_query|>"
YES = Example("y", "Is it?", ("yes",))


@pytest.mark.parametrize(
    ("turns", "over", "stage1", "code", "stage2", "llama"),
    [
        ([f"<think>a {Q}", f"b</think> {right('Ada Lind')}"], {}, 1.0, 2.0, 1.0, 1.0),
        ([f"a {Q}", f"b</think> {right('Ada Lind')}"], {}, 1.0, 2.0, 1.0, 1.0),  # the prompt opened the thought
        ([f"<think>a</think> {right('Ada Lind')}"], {}, 0.5, 1.5, 1.0, 1.0),
        ([f"<think>a {Q}", f"b</think> {right('Byron')}"], {}, 1.0, 0.0, 0.0, 0.0),
        ([f"<think>a {Q}", f"b {right('Lind')}"], {}, 0.5, 1.5, -1.0, 0.0),  # the thought is not closed
        ([f"<think>a {Q}", "b</think>"], {}, 0.5, -0.5, -2.0, -1.0),
        ([f"<think>a {Q}"], {}, 0.0, -1.0, -2.0, -1.0),  # what it asked for never came
        ([f"<think>a</think> {right('a b c d e f g h i j Lind')}"], {}, 0.5, 1.5, 2 / 11 - 2, 2 / 11 - 1),
        ([f"<think>汉</think> {right('Lind')}"], {}, 0.5, 1.5, -1.0, 0.0),
        ([f"<think><|im_start|></think> {right('Lind')}"], {}, 0.5, 1.5, -1.0, 0.0),
        ([f"<think>a</think> {right('True')}"], {"example": YES}, 0.5, -0.5, 1.0, 1.0),
        ([f"{right('Lind')}<think>a</think>"], {}, 0.0, 1.0, -1.0, 0.0),
        ([], {}, 0.0, -1.0, -2.0, -1.0),
    ],
)
def test_r1_searcher(turns, over, stage1, code, stage2, llama):
    episode = finished("r1_searcher", *turns, **over)
    hows = [REWARDS[f"r1_searcher_{name}"] for name in ("stage1", "stage1_code", "stage2")]
    values = [how(episode) for how in (*hows, r1_searcher_stage2(penalty=1.0))]
    np.testing.assert_allclose(values, [stage1, code, stage2, llama], atol=1e-12)


TEXTS = st.lists(st.sampled_from([T, S, Q, right("Lind"), boxed("Lind"), "<think>", "</answer>", " x "])).map("".join)


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(list(PROTOCOLS.values())),
    st.lists(st.tuples(st.sampled_from(list(Segment)), TEXTS), max_size=5),
    st.booleans(),
)
def test_every_reward_is_a_finite_number_for_any_episode(protocol, pieces, ended):
    for reward in REWARDS.values():
        value = reward(Finished(protocol, GOLD, tuple(pieces), ended))
        assert np.isfinite(value)
        assert -2 <= value <= 2


# ---------------------------------------------------------------- terms


@pytest.mark.parametrize(
    ("answer", "golds", "values"),  # em, cover_em, hotpot_f1, true_false_f1, plain_f1, set_f1
    [
        ("Paris", ("Paris",), (1, 1, 1, 1, 1, 1)),
        ("Paris Paris Paris", ("Paris",), (0, 1, 0.5, 0.5, 0.5, 1)),
        ("the Paris", ("Paris",), (1, 1, 1, 1, 1, 2 / 3)),  # the set keeps the article
        ("Paris.", ("Paris",), (1, 1, 1, 1, 1, 0)),  # and the full stop
        ("yes it is", ("yes",), (0, 1, 0, 0, 0.5, 0.5)),
        ("True", ("yes",), (0, 0, 0, 1, 0, 0)),
        ("no", ("False",), (0, 0, 0, 1, 0, 0)),
        ("true story", ("true",), (0, 1, 2 / 3, 0, 2 / 3, 2 / 3)),  # "true" has become a yes, never partly right
        ("Rome", ("Paris", "Rome Italy"), (0, 0, 2 / 3, 2 / 3, 2 / 3, 2 / 3)),
        ("", ("Paris",), (0, 0, 0, 0, 0, 0)),
        (None, ("Paris",), (0, 0, 0, 0, 0, 0)),
    ],
)
def test_answer_metrics_under_their_own_names(answer, golds, values):
    episode = finished("search_r1", "none" if answer is None else right(answer), example=Example("x", "?", golds))
    terms = (em, cover_em, hotpot_f1, true_false_f1, plain_f1, set_f1)
    np.testing.assert_allclose([term(episode) for term in terms], values)
    assert has_answer(episode) == (answer is not None)


@pytest.mark.parametrize("metric", [metrics.set_f1, metrics.plain_f1, metrics.true_false_f1])
def test_metrics_need_golds(metric):
    with pytest.raises(InputError, match="gold"):
        metric("a", ())


def test_form_reads_the_model_alone():
    episode = finished("search_r1", T + S, T + right("a b"), found="<think></answer><think>")
    checks = {
        valid_sequence: 1,
        ended: 1,
        balanced(("<think>", "</think>")): 1,
        occurs("<think>", 2, 2): 1,
        occurs("<think>", 3): 0,
        occurs("<think>", 0, 1): 0,
        in_order("<think>", "<search>", "<answer>"): 1,
        in_order("<answer>", "<search>"): 0,
        in_order("<think>", "<result>"): 0,
        free_of("b<"): 0,
        free_of("z"): 1,
        searched(): 1,
        searched(2): 0,
        searched(0, 0): 0,
        short_answer(2): 1,
        short_answer(1): 0,
    }
    assert [check(episode) for check in checks] == list(checks.values())
    assert balanced(("<think>", "</think>"))(finished("search_r1", "<think>")) == 0
    assert short_answer(9)(finished("search_r1", "hm")) == 0
    assert ended(finished("search_r1", ended=False)) == 0


def test_evidence():
    d1, d3 = Document("d1", "One", ""), Document("d3", "Three", "")
    episode = finished("search_r1", S, S, "x", documents=((d1, d3), (d1,)), found="it is Lind.")
    assert (support_recall(episode), support_f1(episode)) == (0.5, 0.5)
    assert gold_in_observations(episode) == 1
    nothing = finished("search_r1", right("Lind"))
    assert (support_recall(nothing), support_f1(nothing), gold_in_observations(nothing)) == (0, 0, 0)
    with pytest.raises(InputError, match="gold documents"):
        support_recall(finished("search_r1", example=YES))


def one(finished):
    return 1.0


def zero(finished):
    return 0.0


def half(finished):
    return 0.5


def test_combinations():
    episode, closed = finished("search_r1"), finished("search_r1", may_search=False)
    assert gate(half, 2.0, 3.0)(episode) == 2
    assert gate(zero, 2.0, half)(episode) == 0.5
    assert gate(zero, one)(episode) == 0
    assert (or_else(zero, 0.1)(episode), or_else(half, 0.1)(episode)) == (0.1, 0.5)
    assert total(one, half, scaled(half, 2, 1))(episode) == 3.5
    assert total()(episode) == 0
    assert (all_of(one, one)(episode), all_of(one, half)(episode)) == (1, 0)
    arena = total(one, one, scaled(all_of(one, one), 10))  # a bonus for the conjunction
    assert arena(episode) == 12
    assert failed(one, half, zero)(episode) == 2
    assert (by_mode(one, zero)(episode), by_mode(one, zero)(closed)) == (1, 0)


def test_stages():
    of = staged((0, zero), (10, half), (20, one))
    assert [of(step)(finished("search_r1")) for step in (0, 9, 10, 19, 20, 99)] == [0, 0, 0.5, 0.5, 1, 1]
    for stages in [(), ((1, zero),), ((0, zero), (0, one))]:
        with pytest.raises(InputError, match="ascend"):
            staged(*stages)
