"""Monte-Carlo roll-outs on the toy world: episodes that go on from given states, and what candidates are worth."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from toy_world import toy_codec, toy_examples, toy_retriever

from jraggym.agents.digests import Digest
from jraggym.environment import outcome, transition
from jraggym.episodes import Rules
from jraggym.errors import InputError
from jraggym.labelling import Decision
from jraggym.models.decoder import DecoderConfig, init, specs
from jraggym.rollout import Policy, Rollout
from jraggym.sampling import Sampling
from jraggym.sources.rollouts import RolloutSource, policy_rollouts
from jraggym.types import Answer, Malformed, Search, State, Turn

CONFIG = DecoderConfig(vocab=16, model=16, layers=2, query_heads=2, kv_heads=2, head_dim=8, feed_forward=32)
POLICY = Policy(CONFIG, init(specs(CONFIG), jax.random.key(0)))
KEY = jax.random.key(5)
EXAMPLES = toy_examples(6)
RIGHT, WRONG = Answer("Port Selby"), Answer("Morn")


@pytest.fixture(scope="module")
def retriever():
    return toy_retriever()


def make(retriever, **codec):
    return Rollout(CONFIG, toy_codec(**codec), retriever, Sampling(1, 3), Rules(max_turns=4), batch=8)


@pytest.fixture(scope="module")
def rollout(retriever):
    return make(retriever)


@pytest.fixture(scope="module")
def decisions(retriever):
    """States with none to three turns, candidates of every kind, and what their searches bring."""
    found = []
    for i, example in enumerate(EXAMPLES):
        turns = tuple(Turn(Search("Ada novels"), retriever(["Ada novels"])[0]) for _ in range(i % 4))
        actions = (
            Search("Morn mayor"),
            RIGHT,
            Search("coast weather"),
            WRONG,
            Malformed("empty"),
            Search("Morn mayor"),
        )
        queried = i % 4 < 3
        brought = [retriever([a.query])[0] if isinstance(a, Search) and queried else None for a in actions]
        found.append(Decision(example, State(example.question, turns), actions, tuple(brought)))
    return found


# ---------------------------------------------------------------- episodes from given states


def test_an_episode_goes_on_as_it_went_from_any_of_its_states(rollout):
    whole = rollout.run(POLICY, EXAMPLES, KEY)
    assert max(len(t.steps) for t in whole) == 4
    for turn in (1, 2):
        longer = [(e, t) for e, t in zip(EXAMPLES, whole, strict=True) if len(t.steps) > turn]
        starts = [t.steps[turn].state for _, t in longer]
        rest = rollout.run(POLICY, [e for e, _ in longer], KEY, starts=starts)
        assert [t.final for t in rest] == [t.final for _, t in longer]
        assert [[s.state for s in t.steps] for t in rest] == [[s.state for s in t.steps[turn:]] for _, t in longer]


@pytest.mark.parametrize(
    ("starts", "got"),
    [
        ([State("q")], "1 states for 2 examples, 0 of them over"),
        ([State("q"), State("q", answer="x")], "2 states for 2 examples, 1 of them over"),
        ([State("q"), State("q", truncated=True)], "2 states for 2 examples, 1 of them over"),
    ],
)
def test_a_start_that_is_none_is_refused(rollout, starts, got):
    with pytest.raises(InputError, match=f"episodes cannot start here; got {got}"):
        rollout.run(POLICY, EXAMPLES[:2], KEY, starts=starts)


# ---------------------------------------------------------------- worth


def test_a_policy_that_is_always_right_makes_every_search_worth_1(retriever, decisions):
    source = policy_rollouts(make(retriever, actions=("<answer> Port Selby</answer>",)), POLICY, KEY, continuations=2)
    early, last = source([decisions[0], decisions[3]])
    assert early == (1.0, 1.0, 1.0, 0.0, 1.0, 1.0)
    assert last == (0.0, 1.0, 0.0, 0.0, 0.0, 0.0), "on the last turn only the answer counts"


def test_a_policy_that_is_always_wrong_leaves_the_right_answer_alone(retriever, decisions):
    source = policy_rollouts(make(retriever, actions=("<answer> Port Morn</answer>",)), POLICY, KEY, continuations=1)
    assert source(decisions[:1]) == [(0.0, 1.0, 0.0, 0.0, 0.0, 0.0)]
    assert replace(source, metric="f1")(decisions[:1]) == [(0.5, 1.0, 0.5, 0.0, 0.5, 0.5)]


def test_the_worth_is_the_mean_outcome_of_the_policys_own_episodes(rollout, decisions):
    """Against plain episodes under names of their own: the same chance of success."""
    (decision,), m = decisions[1:2], 160
    rewards = policy_rollouts(rollout, POLICY, KEY, continuations=m)([decision])[0]
    assert 0.1 < rewards[0] < 0.9
    for place in (0, 2, 4):
        documents = decision.found[place] or ()
        after = transition(decision.state, decision.actions[place], documents, max_turns=4)
        copies = [replace(decision.example, id=f"copy {i}") for i in range(m)]
        finals = [t.final for t in rollout.run(POLICY, copies, jax.random.key(9), starts=[after] * m)]
        mean = np.mean([outcome(final, decision.example)["em"] for final in finals])
        assert rewards[place] == pytest.approx(mean, abs=4 * (2 * 0.25 / m) ** 0.5)


def test_the_worth_does_not_depend_on_batch_or_order(rollout, decisions):
    source = policy_rollouts(rollout, POLICY, KEY, continuations=3)
    together = source(decisions)
    assert together == [source([decision])[0] for decision in decisions]
    assert together[::-1] == source(decisions[::-1])
    assert all(row[0] == row[5] for row in together), "equal actions are worth the same"
    assert {reward for row in together for reward in row} >= {0.0, 1.0}
    assert any(0 < reward < 1 for row in together for reward in row)
    assert together != policy_rollouts(rollout, POLICY, jax.random.key(6), continuations=3)(decisions)
    assert source([]) == []


def test_states_hold_digests_and_what_fails_is_unlabelled(decisions):
    started = []

    def play(examples, starts):
        assert len({example.id for example in examples}) == len(examples), "names decide draws"
        started.extend(starts)
        ends = [transition(start, RIGHT if start.turns[-1].digest else WRONG, max_turns=4) for start in starts]
        failed = [i % 2 or "coast" in start.turns[-1].action.query for i, start in enumerate(starts)]
        return [None if fault else end for fault, end in zip(failed, ends, strict=True)]

    def read(asked):
        assert len(set(asked)) == len(asked), "each digest is asked for once"
        return [Digest(None, error="down") if "Ada" in query else Digest(f"told of {query}") for _, query, _ in asked]

    first = replace(decisions[0], actions=(*decisions[0].actions[:4], Search("Ada novels"), Search("Morn mayor")))
    first = replace(first, found=(*first.found[:4], first.found[0], first.found[5]))
    (rewards,) = RolloutSource(play, 4, continuations=2, read=read)([first])
    assert rewards == (1.0, 1.0, None, 0.0, None, 1.0)
    assert {start.turns[-1].digest for start in started} == {"told of Morn mayor", "told of coast weather"}


def test_a_search_whose_documents_are_not_known_is_unlabelled(rollout, decisions):
    unknown = replace(decisions[0], found=(None,) * 6)
    (rewards,) = policy_rollouts(rollout, POLICY, KEY, continuations=1)([unknown])
    assert [reward is None for reward in rewards] == [True, False, True, False, False, True]
    assert rewards[1::2][:2] == (1.0, 0.0)


def test_no_continuation_is_refused(rollout):
    with pytest.raises(InputError, match="roll-outs need continuations; got 0"):
        policy_rollouts(rollout, POLICY, KEY, continuations=0)
