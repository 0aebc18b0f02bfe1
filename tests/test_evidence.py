"""Evidence search: what is proposed, how episodes run, how choices are labelled, and the critic of pairs."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import torch
from bert_sample import write_bert
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from jraggym import steps
from jraggym.evidence.episodes import Budget, complete, gains, in_turn, search_evidence
from jraggym.evidence.limits import BEHIND, BEYOND, LOW, limits
from jraggym.evidence.proposals import Proposal, names, propose
from jraggym.evidence.training import Choice, PairBatches, choices_from_json, collect_choices, shuffled
from jraggym.models.bert_critic import PairScorer, PairTokenizer, new_critic, pair_scores, save_bert_critic
from jraggym.models.bert_encoder import BertEncoder
from jraggym.recipes.evidence import EvidenceSettings, at_random, by_critic, by_oracle, the_first
from jraggym.training import Optimization, Step, init_state
from jraggym.types import Document, Example, Search, State, Turn

FLOW = Document("flow", "Human Flow", "Human Flow is a German film directed by Ai Weiwei in 2017.")
WEIWEI = Document("weiwei", "Ai Weiwei", "Ai Weiwei is an artist born in Beijing.")
GERMANY = Document("german", "German", "German is a language.")
QUESTION = "Where was the director of Human Flow born?"
EXAMPLE = Example("1", QUESTION, ("Beijing",), "compositional", ("flow", "weiwei"))
BUDGET = Budget(searches=2, documents=1, together=1, around=3)
CORPUS = (FLOW, WEIWEI, GERMANY)


def lookup(queries, k):
    """Documents whose title stands at the head of the query, and the film for the plain question."""
    return [
        tuple(d for d in CORPUS if query.startswith(d.title) or (query == QUESTION and d is FLOW))[:k]
        for query in queries
    ]


def test_names():
    assert names("When did The Lion of Thebes, by Ai Weiwei's friend, win in 1990?") == ["Lion of Thebes", "Ai Weiwei"]
    assert names("It is by Johann Strauss II. He met J. R. Tolkien near St. Louis, U.S. The end.") == [
        "Johann Strauss II",
        "J. R. Tolkien",
        "St. Louis",
        "U.S",
    ]
    assert names("no names here, at 12") == []
    assert names("Ai Weiwei and Ai Weiwei") == ["Ai Weiwei and Ai Weiwei"]


@given(st.text(max_size=200))
def test_names_are_parts_of_the_text_and_distinct(text):
    found = names(text)
    assert len(set(found)) == len(found)
    assert all(len(name) > 2 and name.split()[0] in text for name in found)


def test_what_a_state_proposes():
    start = State(QUESTION)
    assert propose(start, 3) == (
        Proposal(QUESTION, "the question itself"),
        Proposal(f"Human Flow Human Flow {QUESTION}", "Human Flow | question 1"),
    )
    after = State(QUESTION, (Turn(Search(QUESTION), (FLOW,)),))
    assert propose(after, 3) == (  # the film has been read, and the question asked
        Proposal(f"German German {QUESTION}", "German | 1.2 x1 Human Flow: Flow is a German film directed by"),
        Proposal(
            f"Ai Weiwei Ai Weiwei {QUESTION}", "Ai Weiwei | 1.3 x1 Human Flow: film directed by Ai Weiwei in 2017."
        ),
        Proposal(QUESTION, "more for the question"),
    )


def test_a_proposal_tells_the_first_place_of_its_name_and_how_many_documents_hold_it():
    state = State(QUESTION, (Turn(Search("a"), (FLOW, GERMANY)), Turn(Search("b"), (WEIWEI,))))
    state = dataclasses.replace(state, turns=(*state.turns, Turn(Search("c"), (Document("x", "X", "Beijing, Port"),))))
    whys = [proposal.why.split(" | ")[1].split(" ")[:2] for proposal in propose(state)[1:]]
    assert whys == [["3.2", "x2"], ["4.2", "x1"]]  # Beijing and Port; the others have their documents read


def test_rewards_are_the_share_of_what_is_missing():
    state = State(QUESTION, (Turn(Search(QUESTION), (FLOW,)),))
    proposals = propose(state)
    assert gains(EXAMPLE, state, lookup([p.query for p in proposals], 2)) == [0.0, 1.0, 0.0]
    assert gains(EXAMPLE, State(QUESTION), [(FLOW, WEIWEI), (FLOW,)]) == [1.0, 0.5]


def test_an_episode_reads_only_what_is_new():
    (state,) = search_evidence([EXAMPLE], lookup, by_oracle([EXAMPLE], lookup, settings()), BUDGET)
    assert [turn.documents for turn in state.turns] == [(FLOW,), (WEIWEI,)]
    assert complete(state, EXAMPLE)
    (state,) = search_evidence([EXAMPLE], lookup, the_first, BUDGET)
    assert [turn.documents for turn in state.turns] == [(FLOW,), (GERMANY,)]
    assert not complete(state, EXAMPLE)


def test_documents_are_read_in_turn():
    a, b, c, d = (Document(x, x, x) for x in "abcd")
    start = State("?")
    assert in_turn(start, [(a, b, c), (a, d)], 4) == [(a, b, c), (d,)]
    assert in_turn(start, [(a, b, c), (a, d)], 2) == [(a,), (d,)]
    assert in_turn(start, [(a, b, c), (a, d)], 9) == [(a, b, c), (d,)]
    assert in_turn(State("?", (Turn(Search("x"), (a, d)),)), [(a, b, c), (a, d)], 2) == [(b, c), ()]
    assert in_turn(start, [(), ()], 2) == [(), ()]


@given(st.lists(st.lists(st.integers(0, 9), unique=True, max_size=6), max_size=5), st.integers(0, 12))
def test_reading_in_turn_wastes_nothing_and_is_fair(rankings, documents):
    found = [[Document(str(i), "", "") for i in ranking] for ranking in rankings]
    read = in_turn(State("?"), found, documents)
    ids = [document.id for brought in read for document in brought]
    assert len(ids) == len(set(ids)) == min(documents, len({i for ranking in rankings for i in ranking}))
    for brought, hits in zip(read, found, strict=True):
        assert [d for d in hits if d in brought] == list(brought), "in the order of its ranking"
        others = [len(other) for other in read]
        left = [d for d in hits if d.id not in ids]
        assert not left or len(brought) >= max(others) - 1, "a search with more to bring is not left behind"


def test_a_search_carries_out_several_proposals_together():
    asked = []

    def counted(queries, k):
        asked.append(len(queries))
        return lookup(queries, k)

    (state,) = search_evidence([EXAMPLE], counted, the_first, Budget(searches=2, documents=2, together=2, around=3))
    assert [(turn.action.query.split()[0], turn.documents) for turn in state.turns] == [
        ("Where", (FLOW,)),
        ("Human", ()),  # its only document is the same one
        ("German", (GERMANY,)),
        ("Ai", (WEIWEI,)),
    ]
    assert asked == [2, 2]
    assert [Budget(documents=5, together=n).share for n in (1, 2, 3, 5, 9)] == [5, 3, 2, 1, 1]


def test_an_episode_that_has_ended_asks_nothing_more():
    asked, other = [], dataclasses.replace(EXAMPLE, id="2", support=("flow", "nowhere"))

    def counted(queries, k):
        asked.append(len(queries))
        return lookup(queries, k)

    budget, examples = Budget(searches=3, documents=2, together=2, around=3), [EXAMPLE, other]
    whole = search_evidence(examples, counted, the_first, budget)
    ended = search_evidence(examples, counted, the_first, budget, until=complete)
    assert asked[3:] == [4, 4, asked[2] // 2], "the first question's evidence is complete after two searches"
    assert ended[0].turns == whole[0].turns[:4]
    assert ended[1] == whole[1]
    assert [complete(*pair) for pair in zip(ended, examples, strict=True)] == [True, False]


def test_the_oracle_does_not_take_two_proposals_for_the_same_evidence():
    found = {"film": (FLOW,), "the film": (FLOW,), "useless": (GERMANY,), "artist": (WEIWEI,)}
    offered = [tuple(Proposal(query, query) for query in found)]
    told = EvidenceSettings(documents=2, together=2)
    (order,) = by_oracle([EXAMPLE], lambda queries, k: [found[query] for query in queries], told)(
        [State(QUESTION)], offered
    )
    assert order == [0, 3]
    (order,) = by_oracle([EXAMPLE], lambda queries, k: [(GERMANY,) for _ in queries], told)([State(QUESTION)], offered)
    assert order == [0, 1], "where nothing helps, the first ones"


def test_what_kept_evidence_from_being_read():
    far = Document("far", "Far", "Nobody names it.")
    hidden = Document("hidden", "Hidden", "It comes second.")

    def found(queries, k):
        return [(*hits, hidden) if hits == (GERMANY,) else hits for hits in lookup(queries, k)]

    example = dataclasses.replace(EXAMPLE, support=("flow", "weiwei", hidden.id, far.id))
    last = lambda states, offered: [list(range(len(offer)))[::-1] for offer in offered]  # noqa: E731
    budget = Budget(searches=2, documents=2, together=1, around=3)
    # first the film, as the question's or the name's; then of "German" and "Ai Weiwei" only the last
    assert limits([example], found, last, budget) == {LOW: 0, BEHIND: 1, BEYOND: 1}
    assert limits([example], found, the_first, budget) == {LOW: 1, BEHIND: 0, BEYOND: 1}
    assert limits([EXAMPLE], lookup, last, budget) == {LOW: 0, BEHIND: 0, BEYOND: 0}


def test_the_question_can_be_asked_again():
    plain = Example("2", "no names?", ("x",), "", ("flow", "weiwei"))
    (state,) = search_evidence([plain], lambda queries, k: [CORPUS[:k] for _ in queries], the_first, BUDGET)
    assert [turn.documents for turn in state.turns] == [(FLOW,), (WEIWEI,)]


def test_random_choices_depend_on_the_question_alone():
    states = [State(f"Question {i}?") for i in range(20)]
    offered = [(Proposal("a", "a"),) * 7] * 20
    orders = at_random(0)(states, offered)
    assert orders == [at_random(0)([s], [o])[0] for s, o in zip(states, offered, strict=True)]
    assert all(sorted(order) == list(range(7)) for order in orders)
    assert len({order[0] for order in orders}) > 2
    assert orders != at_random(1)(states, offered)


def test_choices_hold_good_and_useless_proposals():
    choices = collect_choices([EXAMPLE], lookup, BUDGET, rounds=3, seed=0)
    assert {choice.step for choice in choices} == {1}  # at the start either proposal brings the film
    for choice in choices:
        assert [why.split(" |")[0] for why, reward in zip(choice.whys, choice.rewards, strict=True) if reward] == [
            "Ai Weiwei"
        ]
        assert set(choice.rewards) == {0.0, 1.0}
    assert choices == collect_choices([EXAMPLE], lookup, BUDGET, rounds=3, seed=0)
    plain = json.loads(json.dumps([dataclasses.asdict(choice) for choice in choices]))
    assert choices_from_json(plain) == choices


def test_every_second_round_carries_out_the_first_proposals():
    asked = []

    def counted(queries, k):
        asked.append(list(queries))
        return lookup(queries, k)

    collect_choices([EXAMPLE], counted, BUDGET, rounds=6, good=0.0)
    first = [carried == offered[:1] for offered, carried in zip(asked[::2], asked[1::2], strict=True)]
    rounds = [all(first[i : i + BUDGET.searches]) for i in range(0, len(first), BUDGET.searches)]
    assert len(rounds) == 6
    assert all(rounds[1::2])
    assert not all(rounds[::2])


def test_shuffled_rewards_are_the_same_ones():
    choice = Choice("q", tuple("abcdefgh"), (1.0, 0.5, 0, 0, 0, 0, 0, 0), 1)
    dealt = shuffled([choice] * 20, 0)
    assert all(sorted(c.rewards) == sorted(choice.rewards) and c.whys == choice.whys for c in dealt)
    assert len({c.rewards for c in dealt}) > 5


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = write_bert(tmp_path_factory.mktemp("bert"), positions=64)
    return BertEncoder.load(folder, "sentence-transformers/all-MiniLM-L6-v2")


def settings():
    return EvidenceSettings(searches=2, documents=1, together=1, around=3)


def test_batches_are_functions_of_the_step(encoder):
    asked = ("port", "sea", "hill", "novel", "tarvan")
    choices = [Choice(question, tuple("abcdefgh"), (1.0, 1.0, 1.0, 0, 0, 0, 0, 0), 1) for question in asked]
    batches = PairBatches(choices, PairTokenizer.of(encoder, 32), states=2, contrasts=6, positives=2, seed=3)
    batch = batches[4]
    assert batch.ids.shape[:2] == (2, 6)
    assert (batch.reward > 0).sum(axis=1).tolist() == [2, 2]
    assert batch.candidate_mask.all()
    again = PairBatches(choices, PairTokenizer.of(encoder, 32), states=2, contrasts=6, positives=2, seed=3)[4]
    jax.tree.map(np.testing.assert_array_equal, batch, again)
    seen = [first for step in range(5) for first in batches[step].ids[:, 0, 1].tolist()]
    assert all(seen.count(first) == 2 for first in seen), "ten rows of five choices show each of them twice"


def test_padding_has_no_gradient(encoder):
    config = encoder.query.config
    weights = new_critic(encoder, jax.random.key(0))
    choices = [Choice("who was born in port", ("the sea", "a hill", "born"), (1.0, 0.0, 0.0), 1)]
    narrow = PairBatches(choices, PairTokenizer.of(encoder, 32), states=1, contrasts=3)[0]
    wide = PairBatches(choices, PairTokenizer.of(encoder, 32), states=1, contrasts=5)[0]
    run = jax.jit(jax.value_and_grad(steps.pair_critic(config, pairwise=0.0, listwise=1.0), has_aux=True))
    (one, _), left = run(weights, narrow, None, jax.random.key(0))
    (two, _), right = run(weights, wide, None, jax.random.key(0))
    assert float(one) == pytest.approx(float(two), rel=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), left, right)


def test_frozen_layers_get_no_gradient_and_the_rest_the_same(encoder):
    weights = new_critic(encoder, jax.random.key(0))
    ids, kinds = PairTokenizer.of(encoder, 32)([("who was born", "the sea of port"), ("tarvan", "a novel")])

    def gradient(frozen):
        return jax.jit(jax.grad(lambda w: pair_scores(w, encoder.query.config, ids, kinds, frozen).sum()))(weights)

    whole, part = gradient(0), gradient(2)
    for leaf in jax.tree.leaves((part.trunk.word, part.trunk.norm, jax.tree.map(lambda x: x[:2], part.trunk.layers))):
        assert not np.any(leaf)
    upper = [jax.tree.map(lambda x: x[2:], g.trunk.layers) for g in (whole, part)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *upper)
    np.testing.assert_allclose(whole.head.weight, part.head.weight, atol=1e-6)


def test_the_critic_learns_which_name_is_asked_for(encoder):
    choices = [Choice("who was born", ("the sea", "a hill", "born in port", "novel"), (0.0, 0.0, 1.0, 0.0), 1)]
    batch = PairBatches(choices, tokenize := PairTokenizer.of(encoder, 32), states=1, contrasts=4)[0]
    objective = steps.pair_critic(encoder.query.config, pairwise=0.0, listwise=1.0)
    optimizer = Optimization(20, matrix_rate=0.0, rate=1e-2, warmup=1).build()
    state, step = init_state(new_critic(encoder, jax.random.key(0)), optimizer), Step(objective, optimizer)
    for _ in range(20):
        state, metrics = step(state, batch)
    assert float(metrics["loss"]) < 0.1
    assert step.compilations == 1
    scorer = PairScorer(state.weights, encoder.query.config, tokenize)
    offered = [tuple(Proposal(why, why) for why in choices[0].whys)]
    (order,) = by_critic(scorer)([State("who was born")], offered)
    assert order[0] == 2
    assert scorer([("who was born", choices[0].whys[i]) for i in order]) == sorted(
        scorer([("who was born", why) for why in choices[0].whys]), reverse=True
    )


def test_scores_equal_those_of_transformers(encoder, tmp_path):
    weights, tokenize = new_critic(encoder, jax.random.key(1)), PairTokenizer.of(encoder, 24)
    pairs = [
        ("Who was born in the sea?", "Port | the hills of Morn: a novel of the sea"),
        ("A novel", "b"),
        ("the sea and the hill " * 9, "novel"),  # longer than all that is read
        ("the sea " * 5, "novel of the port and the hill " * 9),  # too long: the longer text is cut
    ]
    save_bert_critic(tmp_path / "critic", weights, encoder.query.config, tokenize)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "critic").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "critic")
    told = {"padding": True, "truncation": "longest_first", "max_length": 24, "return_tensors": "pt"}
    with torch.inference_mode():
        expected = model(**tokenizer([a for a, _ in pairs], [b for _, b in pairs], **told)).logits[:, 0].numpy()
    ours = PairScorer(weights, encoder.query.config, tokenize, batch=2)(pairs)
    np.testing.assert_allclose(ours, expected, atol=1e-5)
    assert len(set(ours)) == 4
