"""The jitted rollout: one compilation, results that depend on (key, example) alone, and the same on a mesh."""

import faulthandler
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_world import Watched, toy_codec, toy_examples, toy_retriever

from jraggym.environment import wants_retrieval
from jraggym.episodes import Episodes
from jraggym.errors import InputError
from jraggym.host_calls import PIECE
from jraggym.labelling import support_judge
from jraggym.models.critic import critic_specs
from jraggym.models.decoder import DecoderConfig, init, specs
from jraggym.retrieval.hybrid import BrokenRetriever
from jraggym.rollout import Policy, Rollout, Rules
from jraggym.sampling import Sampling
from jraggym.sharding import batch_shards, make_mesh, place, shardings
from jraggym.text.actions import parse_action
from jraggym.types import Malformed, Search

CONFIG = DecoderConfig(vocab=16, model=16, layers=2, query_heads=2, kv_heads=2, head_dim=8, feed_forward=32)
SAMPLING = Sampling(candidates=3, max_tokens=3)
RULES = Rules(max_turns=4, select="score")
EXAMPLES = toy_examples(11)
KEY = jax.random.key(5)
DEADLOCK_SECONDS = 180


@pytest.fixture(autouse=True)
def no_endless_wait():
    """A dead-lock between callbacks cannot be interrupted: say where every thread stands, and end."""
    faulthandler.dump_traceback_later(DEADLOCK_SECONDS, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(scope="module")
def policy():
    actor, critic = init(specs(CONFIG), jax.random.key(0)), init(critic_specs(CONFIG), jax.random.key(1))
    return Policy(CONFIG, actor, critic)


@pytest.fixture(scope="module")
def retriever():
    return toy_retriever()


@pytest.fixture(scope="module")
def rollout(retriever):
    """Shared by the tests that need no other program than this one."""
    return Rollout(CONFIG, toy_codec(), retriever, SAMPLING, RULES, batch=8)


@pytest.fixture(scope="module")
def reference(rollout, policy):
    return list(rollout.run(policy, EXAMPLES, KEY))


def view(trajectories):
    """What must not depend on batch or mesh; scores and log-probabilities agree up to rounding."""
    return {
        t.example_id: (
            [([c.text for c in s.candidates], s.chosen, [c.documents for c in s.candidates]) for s in t.steps],
            t.final,
        )
        for t in trajectories
    }


def schedule(trajectories, batch, shards):
    """When each turn runs, as (shard, step of the loop, trajectory, turn): freed slots go to those that wait."""
    size = batch // shards
    for shard in range(shards):
        running = [[t, 0] for t in trajectories[:batch][shard * size : (shard + 1) * size]]
        waiting, step = list(trajectories[batch:][shard::shards]), 0
        while running:
            for slot in running:
                yield shard, step, *slot
                slot[1] += 1
                if slot[1] == len(slot[0].steps) and waiting:
                    slot[:] = [waiting.pop(0), 0]
            running = [slot for slot in running if slot[1] < len(slot[0].steps)]
            step += 1


def searches(trajectories, batch, shards):
    """How many searches are due: one for each step and shard in which some row retrieves."""
    due = set()
    for shard, number, trajectory, turn in schedule(trajectories, batch, shards):
        step = trajectory.steps[turn]
        if wants_retrieval(step.state, parse_action(step.candidates[step.chosen].text), RULES.max_turns):
            due.add((shard, number))
    return len(due)


# ---------------------------------------------------------------- one device


def test_the_sample_has_every_kind_of_episode(reference):
    finals = [trajectory.final for trajectory in reference]
    assert {len(state.turns) for state in finals} >= {0, 4}
    assert any(state.truncated for state in finals)
    assert any(state.answer for state in finals)
    turns = [turn for state in finals for turn in state.turns]
    assert any(turn.documents for turn in turns)
    assert any(isinstance(turn.action, Malformed) for turn in turns)
    assert not any(turn.documents for turn in turns if isinstance(turn.action, Malformed))


def test_one_compilation_over_turns_batches_and_a_short_last_batch(rollout, policy, reference):
    assert [t.example_id for t in reference] == [e.id for e in EXAMPLES]
    assert max(len(t.steps) for t in reference) == RULES.max_turns
    list(rollout.run(policy, EXAMPLES[:1], jax.random.key(6)))
    assert list(rollout.run(policy, (), KEY)) == []
    assert rollout.compilations == 1


def test_finished_episodes_make_room(rollout, policy, reference, monkeypatch):
    steps, told = [], []
    act = Episodes.act

    def note(self, step, *rest):
        steps.append(step)
        return act(self, step, *rest)

    monkeypatch.setattr(Episodes, "act", note)
    assert view(rollout.run(policy, EXAMPLES, KEY, report=told.append)) == view(reference)
    turns = [len(t.steps) for t in reference]
    apart = max(turns[:8]) + max(turns[8:])
    assert steps == list(range(1 + max(step for _, step, _, _ in schedule(reference, 8, 1))))
    assert len(steps) < apart, "no better than one batch after the other"
    assert told == sorted(told)
    assert told[-1] == len(EXAMPLES)


def test_every_episode_ends_within_its_turns(reference):
    for trajectory in reference:
        assert trajectory.final.done
        assert len(trajectory.steps) <= RULES.max_turns
        assert len(trajectory.steps) == len(trajectory.final.turns) + (trajectory.final.answer is not None)


def test_a_result_depends_on_key_and_example_not_on_the_batch(rollout, policy, reference, retriever):
    mixed = [EXAMPLES[i] for i in (9, 3, 10, 0, 7)]
    assert view(rollout.run(policy, mixed, KEY)) == view(reference[i] for i in (9, 3, 10, 0, 7))
    small = Rollout(CONFIG, toy_codec(), retriever, SAMPLING, RULES, batch=3)
    assert view(small.run(policy, EXAMPLES, KEY)) == view(reference)
    other = list(rollout.run(policy, EXAMPLES, jax.random.key(6)))
    assert view(other) != view(reference), "another key draws other actions"


def test_one_search_a_turn(rollout, policy, reference, retriever):
    watched = Watched(retriever)
    assert view(rollout.run(policy, EXAMPLES, KEY, retriever=watched)) == view(reference)
    assert len(watched.calls) == searches(reference, batch=8, shards=1)


def test_the_best_score_is_executed(reference):
    steps = [step for trajectory in reference for step in trajectory.steps]
    for step in steps:
        texts = [candidate.text for candidate in step.candidates]
        best = max(range(3), key=lambda i: step.candidates[i].score)
        assert step.chosen == texts.index(texts[best]), "the best score, and of equal texts the first"
    assert len({step.chosen for step in steps}) == 3, "the scores decide nothing here"
    assert all(candidate.logprob < 0 for step in steps for candidate in step.candidates)


def explode(number, found):
    if number == 0:
        raise RuntimeError("index is gone")
    return found


def test_a_failing_retriever_marks_its_episodes_and_the_others_are_untouched(rollout, policy, reference, retriever):
    found = list(rollout.run(policy, EXAMPLES[:8], KEY, retriever=Watched(retriever, explode)))
    failed = 0
    for ours, before in zip(found, reference, strict=False):
        first = before.steps[0]
        searched = wants_retrieval(first.state, parse_action(first.candidates[first.chosen].text), RULES.max_turns)
        assert ours.final.failed == searched
        if searched:
            assert ours.final.turns[0].error == "RuntimeError: index is gone"
            failed += 1
        else:
            assert view([ours]) == view([before])
    assert 0 < failed < 8
    assert rollout.compilations == 1


def test_other_rules_live_on_the_host(rollout, policy, reference, retriever):
    short = list(rollout.run(policy, EXAMPLES, KEY, rules=Rules(max_turns=2, select="first")))
    assert max(len(t.steps) for t in short) == 2
    assert {step.chosen for t in short for step in t.steps} == {0}
    broken = list(rollout.run(policy, EXAMPLES, KEY, retriever=BrokenRetriever(retriever, 1)))
    assert view(broken) == view(rollout.run(policy, EXAMPLES, KEY, retriever=BrokenRetriever(retriever, 1)))
    assert view(broken) != view(reference)
    assert rollout.compilations == 1
    for rules in (Rules(max_turns=5), Rules(max_turns=4, judge=support_judge)):
        with pytest.raises(InputError, match="these rules do not fit the compiled rollout"):
            list(rollout.run(policy, EXAMPLES, KEY, rules=rules))


def test_a_fault_of_our_own_is_raised_as_itself(rollout, policy, reference, monkeypatch):
    def refuse(self, *args):
        raise InputError("the state has no name", got="none", remedy="Give it one.")

    with monkeypatch.context() as patch:
        patch.setattr(Episodes, "observe", refuse)
        with pytest.raises(InputError, match="the state has no name"):
            list(rollout.run(policy, EXAMPLES, KEY))
    assert view(rollout.run(policy, EXAMPLES, KEY)) == view(reference), "the next run is not touched"


def test_the_judge_sees_every_candidate_of_one_search_a_turn(policy, retriever):
    watched = Watched(retriever)
    rules = Rules(max_turns=4, judge=support_judge, select="reward")
    judged = Rollout(CONFIG, toy_codec(), watched, SAMPLING, rules, batch=8)
    trajectories = list(judged.run(replace(policy, critic=None), EXAMPLES[:8], KEY))
    assert len(watched.calls) <= 3
    wanted = []
    for step in (step for trajectory in trajectories for step in trajectory.steps):
        rewards = [candidate.reward or 0.0 for candidate in step.candidates]
        assert rewards[step.chosen] == max(rewards)
        assert max(rewards) in (0.5, 1.0)
        actions = [parse_action(candidate.text) for candidate in step.candidates]
        by_action = dict(zip(actions, rewards, strict=True))
        assert [by_action[action] for action in actions] == rewards, "the same action got two rewards"
        for action, candidate in zip(actions, step.candidates, strict=True):
            executed = wants_retrieval(step.state, action, 4)
            assert bool(candidate.documents) == executed
            wanted += [action.query] if executed and isinstance(action, Search) else []
    assert sorted(wanted) == sorted(query for call in watched.calls for query in call)


# ---------------------------------------------------------------- a mesh


@pytest.fixture(scope="module", params=[(8, 1, 1), (4, 1, 2), (2, 2, 2)], ids=str)
def mesh(request):
    return make_mesh(*request.param)


@pytest.mark.parametrize("sharded", [False, True], ids=["replicated", "sharded"])
def test_a_mesh_gives_the_episodes_of_one_device(policy, reference, retriever, mesh, sharded, monkeypatch):
    acts, act = [], Episodes.act

    def note(self, step, *rest):
        acts.append(step)
        return act(self, step, *rest)

    monkeypatch.setattr(Episodes, "act", note)
    watched = Watched(retriever)
    if sharded:
        actor = place(policy.actor, shardings(specs(CONFIG), mesh))
        policy = replace(policy, actor=actor, critic=place(policy.critic, shardings(critic_specs(CONFIG), mesh)))
    spread = Rollout(CONFIG, toy_codec(), watched, SAMPLING, RULES, batch=8, mesh=mesh)
    found = list(spread.run(policy, EXAMPLES, KEY))
    assert view(found) == view(reference)
    assert spread.compilations == 1
    assert len(watched.calls) == searches(reference, batch=8, shards=batch_shards(mesh))
    loops = 1 + max(step for _, step, _, _ in schedule(reference, 8, batch_shards(mesh)))
    assert len(acts) == batch_shards(mesh) * loops, "one replica of each shard calls"


def test_a_fault_on_one_shard_is_raised_and_no_other_waits_for_it(policy, retriever, monkeypatch):
    spread = Rollout(CONFIG, toy_codec(), retriever, SAMPLING, RULES, batch=8, mesh=make_mesh(4, 1, 2))
    observe = Episodes.observe

    def refuse(self, step, rows, vectors):
        if rows[0] == 4:
            raise InputError("shard two has no disk", got="none", remedy="Give it one.")
        return observe(self, step, rows, vectors)

    with monkeypatch.context() as patch:
        patch.setattr(Episodes, "observe", refuse)
        with pytest.raises(InputError, match="shard two has no disk"):
            list(spread.run(policy, EXAMPLES, KEY))
    assert len(list(spread.run(policy, EXAMPLES, KEY))) == 11


class Wide(Watched):
    """Its query vectors are too large for one operand of a callback; each row holds the query's first token."""

    def __init__(self, retriever):
        super().__init__(retriever)
        self.params = jnp.arange(PIECE, dtype=jnp.float32)  # 4 bytes each: four pieces a row
        self.encode = lambda params, ids, mask: ids[:, :1] + params
        self.seen = []

    def search(self, queries, vectors, k=None):
        self.seen += zip(queries, vectors, strict=True)
        return super().search(queries, np.zeros((len(queries), 6), np.float32), k)


def test_large_vectors_reach_the_host_whole_and_lock_nothing(policy, retriever):
    wide = Wide(retriever)
    spread = Rollout(CONFIG, toy_codec(), wide, SAMPLING, RULES, batch=16, mesh=make_mesh(8))
    found = list(spread.run(replace(policy, critic=None), toy_examples(16), KEY, rules=Rules(4, "first")))
    assert len(found) == 16
    assert len(wide.seen) > 8
    for query, vector in wide.seen:
        first = wide.tokenize([query])[0][0, 0]
        np.testing.assert_array_equal(vector, first + np.arange(PIECE, dtype=np.float32))


def test_a_batch_that_cannot_be_split_is_refused(retriever):
    with pytest.raises(InputError, match="the batch cannot be split over the mesh; got batch 6 and 4 shards"):
        Rollout(CONFIG, toy_codec(), retriever, SAMPLING, RULES, batch=6, mesh=make_mesh(4))
