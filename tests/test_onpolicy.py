"""On-policy training: transcripts hold what the policy saw, samplers and trainers agree, and a killed run continues."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from array_samples import worst_difference

from jraggym.checkpoint import Checkpointer
from jraggym.data.synthhop import make_world
from jraggym.errors import InputError
from jraggym.experience import GRPO, PPO
from jraggym.gathering import Gatherer, draw
from jraggym.labelling import support_judge
from jraggym.models.critic import critic_specs
from jraggym.models.decoder import DecoderConfig, init, specs
from jraggym.models.lora import Lora, lora_specs
from jraggym.objectives.kl import AdaptiveKL
from jraggym.objectives.policy import PolicyLoss
from jraggym.onpolicy import OnPolicy, Schedule, policy_of, train_on_policy
from jraggym.retrieval.corpus import Corpus
from jraggym.retrieval.hybrid import HybridRetriever
from jraggym.rollout import Policy, Rollout, Rules
from jraggym.sampling import Sampling
from jraggym.sharding import make_mesh, place, shardings
from jraggym.steps import Network
from jraggym.text.actions import format_action
from jraggym.text.batching import Codec, collate
from jraggym.text.rendering import render
from jraggym.text.tokenizer import SentencePieceTokenizer
from jraggym.training import Optimization
from jraggym.types import Answer, Candidate, Document, Example, Malformed, Search, State, Step, Trajectory, Turn

TURNS, K = 3, 4
OPTIMIZATION = Optimization(1, matrix_rate=0.0, rate=3e-3, warmup=0, schedule="constant")


@pytest.fixture(scope="module")
def world():
    """Examples, a codec with a real tokenizer, and a retriever."""
    made = make_world("development", 0, questions=8)
    texts = [segment for e in made.examples for segment in render(State(e.question), TURNS)]
    texts += [document.text for document in made.documents[:100]]
    corpus = Corpus.from_documents(made.documents[:100])
    tokenizer = SentencePieceTokenizer.train(texts, 700)
    return made.examples, Codec(tokenizer, TURNS, 96), HybridRetriever(corpus, k=1)


@pytest.fixture(scope="module")
def config(world):
    vocab = world[1].tokenizer.vocab_size
    return DecoderConfig(vocab, model=16, layers=1, query_heads=2, kv_heads=2, head_dim=8, feed_forward=32)


@pytest.fixture(scope="module")
def actor(config):
    return init(specs(config), jax.random.key(0))


def gatherer(world, config, groups="candidates", judge=True, mesh=None):
    examples, codec, retriever = world
    rules = Rules(TURNS, "first", support_judge if judge else None)
    sampling = Sampling(K if groups == "candidates" else 1, 6)
    rollout = Rollout(config, codec, retriever, sampling, rules, batch=4, mesh=mesh)
    return Gatherer(rollout, codec, examples, 4, jax.random.key(7), groups, copies=K)


# ---------------------------------------------------------------- transcripts


def drawn(codec, text, reward=None):
    ids = tuple(codec.tokenizer.encode([text])[0])
    return Candidate(text, reward, None, -1.0 * len(ids), (), ids, tuple(-0.1 * (i + 1) for i in range(len(ids))))


def episode(codec, *moves):
    """An episode of (action, documents, reward); the action's text is canonical unless given."""
    state, steps = State("Where is it?"), []
    for action, documents, reward in moves:
        text = action if isinstance(action, str) else format_action(action)
        steps.append(Step(state, (drawn(codec, text, reward),), 0))
        parsed = Malformed("no action") if isinstance(action, str) else action
        if isinstance(parsed, Answer):
            state = dataclasses.replace(state, answer=parsed.text)
        else:
            state = dataclasses.replace(state, turns=(*state.turns, Turn(parsed, documents)))
    return Trajectory("e", tuple(steps), state)


def test_a_transcript_is_the_last_prompt_and_the_last_action(world):
    _, codec, _ = world
    page = Document("d", "Bexlis", "A town in the north.")
    done = episode(codec, (Search("Bexlis"), (page,), 1.0), (Search("north"), (), 0.25), (Answer("Morn"), (), 0.5))
    row = codec.transcripts([done], [0.75], baseline=0.5)
    last = done.steps[-1]
    assert row.prompt + row.actions[0] == codec.prompt(last.state) + list(last.candidates[0].tokens)
    own = [token for step in done.steps for token in step.candidates[0].tokens]
    assert [t for t, counts in zip(row.actions[0], row.loss_masks[0], strict=True) if counts] == own
    kept = [x for x, counts in zip(row.logprobs[0], row.loss_masks[0], strict=True) if counts]
    assert kept == [x for step in done.steps for x in step.candidates[0].logprobs]
    assert [r for r in row.step_rewards[0] if r] == [0.5, -0.25]  # the third is 0.5 - 0.5
    assert row.rewards == [0.75]
    ends = np.cumsum([len(step.candidates[0].tokens) for step in done.steps])
    places = np.flatnonzero(row.loss_masks[0])[ends - 1]
    assert [row.step_rewards[0][i] for i in places] == [0.5, -0.25, 0.0]


@pytest.mark.parametrize("odd", ["no action at all", "<search>  Bexlis</search>"])
def test_a_transcript_ends_where_later_prompts_show_something_else(world, odd):
    _, codec, _ = world
    done = episode(codec, (odd, (), 0.5), (Answer("Morn"), (), 1.0))
    if odd.startswith("<search>"):  # parsed well, but rendered without the second blank
        turn = Turn(Search("Bexlis"), ())
        after = dataclasses.replace(done.steps[1].state, turns=(turn,))
        done = dataclasses.replace(done, steps=(done.steps[0], dataclasses.replace(done.steps[1], state=after)))
    row = codec.transcripts([done], [1.0])
    assert row.actions[0] == list(done.steps[0].candidates[0].tokens)
    assert all(row.loss_masks[0])


def test_a_transcript_ends_before_a_prompt_that_lost_its_beginning(world):
    _, codec, _ = world
    long = Document("d", "Bexlis", "north " * 200)
    done = episode(codec, (Search("Bexlis"), (long,), 1.0), (Answer("Morn"), (), 1.0))
    assert codec.transcripts([done], [1.0]).actions[0] == list(done.steps[0].candidates[0].tokens)


def test_samples_all_count_and_keep_their_tokens(world):
    _, codec, _ = world
    a, b = drawn(codec, "<answer> Morn</answer>", 1.0), drawn(codec, "<answer> Ada</answer>", None)
    row = codec.samples(State("Where?"), [a, a, b])
    assert row.distinct == [True, True, False]
    assert row.actions == [list(a.tokens), list(a.tokens), list(b.tokens)]
    batch = collate([row], prompt=64, action=12, candidates=3)
    np.testing.assert_allclose(batch.behaviour_logprob[0, 0, : len(a.logprobs)], a.logprobs)
    assert batch.token_reward is None


# ---------------------------------------------------------------- gathering


def test_every_question_comes_once_before_any_comes_again():
    drawn = [draw(range(8), 4, i) for i in range(4)]
    assert sorted(drawn[0] + drawn[1]) == sorted(drawn[2] + drawn[3]) == list(range(8))
    assert drawn[0] + drawn[1] != drawn[2] + drawn[3]


def test_copies_of_a_question_are_drawn_apart(world, config, actor):
    gathered = gatherer(world, config, "episodes", judge=False)(Policy(config, actor), 0)
    assert len(gathered.rows) == 4
    assert all(len({tuple(ids) for ids in row.actions}) > 1 for row in gathered.rows), "copies must differ"
    kept = sum(sum(mask) for row in gathered.rows for mask in row.loss_masks)
    assert 0 < kept <= gathered.tokens, "what a transcript leaves out was sampled all the same"


def test_a_critics_scores_are_rewards(world, config, actor):
    critic = init(critic_specs(config), jax.random.key(3))
    scored = gatherer(world, config, judge=False)(Policy(config, actor, critic), 0)
    assert len({reward for row in scored.rows for reward in row.rewards}) > 4


@pytest.mark.parametrize(("outcome", "half"), [("f1", 2 / 3), ("em", 0.0)])
def test_the_outcome_of_each_copy_is_its_reward(world, outcome, half):
    _, codec, _ = world
    question = Example("e", "Where is it?", ("Port Selby",))
    answers = ("Port Selby", "Morn", "Selby")
    played = [episode(codec, (Answer(text), (), None)) for text in answers]
    rollout: Any = SimpleNamespace(run=lambda policy, examples, key, report: played)
    gather = Gatherer(rollout, codec, [question], 1, jax.random.key(0), "episodes", copies=3, outcome=outcome)
    (row,) = gather(Policy(DecoderConfig(), None), 0).rows  # type: ignore[arg-type]
    assert row.rewards == pytest.approx([1.0, 0.0, half])


@pytest.mark.parametrize(
    ("rewards", "need_good", "kept"),
    [((0.5, 0.5), False, 0), ((0.5, 0.2), False, 1), ((0.5, 0.2), True, 0), ((1.0, 0.5), True, 1)],
)
def test_states_that_teach_nothing_are_left_out(world, rewards, need_good, kept):
    _, codec, _ = world
    candidates = tuple(drawn(codec, f"<answer> {i}</answer>", reward) for i, reward in enumerate(rewards))
    state = State("Where is it?")
    played = [Trajectory("e", (Step(state, candidates, 0),), dataclasses.replace(state, answer="0"))]
    rollout: Any = SimpleNamespace(run=lambda policy, examples, key, report: played)
    gather = Gatherer(rollout, codec, [Example("e", "?", ("0",))], 1, jax.random.key(0), need_good=need_good)
    assert len(gather(Policy(DecoderConfig(), None), 0).rows) == kept  # type: ignore[arg-type]


# ---------------------------------------------------------------- the loop


def job_of(world, config, actor, algorithm, groups="candidates", mesh=None, there=None, lora=None, **schedule):
    shape = {"prompt": 96, "action": 6} if groups == "candidates" else {"prompt": 48, "action": 102}
    plan = Schedule(**{"iterations": 3, "updates": 2, "rows": 4, "epochs": 2, "candidates": K, **shape, **schedule})
    there = mesh if there is None else there
    gather = gatherer(world, config, groups, judge=False, mesh=there)
    value = OPTIMIZATION if isinstance(algorithm, PPO) else None
    # What an untrained actor writes is malformed, and a judge finds it all alike: a critic's scores differ.
    critic = init(critic_specs(config), jax.random.key(9)) if groups == "candidates" else None
    if there is not None:
        critic = place(critic, shardings(critic_specs(config), there))
    meshes = {"mesh": mesh, "rollout_mesh": there}
    return OnPolicy(Network(config, lora), algorithm, OPTIMIZATION, gather, plan, actor, value, critic, **meshes)


KL = PolicyLoss(kl_weight=0.01)
ALGORITHMS = {
    "GRPO": GRPO(loss=KL),
    "GRPO, KL in the reward": GRPO("leave_one_out", reward_kl_weight=0.1),
    "PPO": PPO(adaptive=AdaptiveKL(0.5, horizon=50), loss=PolicyLoss(entropy_weight=0.01)),
}


@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_sampler_and_trainer_agree_at_every_iteration(world, config, actor, name):
    seen = []
    value = init(critic_specs(config), jax.random.key(3)) if name == "PPO" else None
    job = job_of(world, config, actor, ALGORITHMS[name])
    state = train_on_policy(job, actor, value, report=lambda i, metrics: seen.append(metrics))
    assert [m["sampler_gap_max"] < 1e-4 for m in seen] == [True] * 3, seen
    assert seen[0]["sequence_kl"] == pytest.approx(0.0, abs=1e-6)
    assert seen[-1]["sequence_kl"] != 0.0, "the policy must have moved"
    assert int(state.policy.step) == 3 * 2 * 2
    assert worst_difference(state.policy.weights, actor) > 1e-4
    if name == "PPO":
        assert float(state.kl_weight) < 0.01, "below its target the weight falls"
        assert {"value_loss", "explained", "entropy", "kl_weight"} <= set(seen[0])


def test_groups_of_whole_episodes_train_too(world, config, actor):
    seen = []
    job = job_of(world, config, actor, GRPO("mean_only"), "episodes", iterations=2, rows=2)
    train_on_policy(job, actor, report=lambda i, metrics: seen.append(metrics))
    assert max(m["sampler_gap_max"] for m in seen) < 1e-4, seen
    assert [m["groups"] for m in seen] == [4.0, 4.0]


class Killed(Exception):
    pass


def test_a_killed_run_ends_with_the_same_bits(world, config, actor, tmp_path):
    job = job_of(world, config, actor, ALGORITHMS["PPO"])
    value = init(critic_specs(config), jax.random.key(3))
    whole = train_on_policy(job, actor, value, Checkpointer(tmp_path / "whole"), every=1)

    def kill(iteration, metrics):
        if iteration == 2:
            raise Killed

    with pytest.raises(Killed):
        train_on_policy(job, actor, value, Checkpointer(tmp_path / "killed"), every=1, report=kill)
    resumed = train_on_policy(job, actor, value, Checkpointer(tmp_path / "killed"), every=1)
    assert worst_difference(whole, resumed) == 0.0


def test_evaluation_comes_at_the_start_and_before_each_save(world, config, actor, tmp_path):
    seen, job = [], job_of(world, config, actor, GRPO(), epochs=1)
    for _ in range(2):  # the second call finds everything done
        train_on_policy(
            job, actor, checkpointer=Checkpointer(tmp_path), every=2, evaluate=lambda i, policy: seen.append(i)
        )
    assert seen == [0, 2, 3]


def test_adapters_are_trained_and_sampled_from(world, config, actor):
    lora = Lora(rank=2, dropout=0.1)
    job = job_of(world, config, actor, GRPO(loss=KL), lora=lora, iterations=2)
    adapters, seen = init(lora_specs(config, lora), jax.random.key(1)), []
    state = train_on_policy(job, adapters, report=lambda i, metrics: seen.append(metrics))
    assert max(m["sampler_gap_max"] for m in seen) < 1e-4, "the sampler's merged weights are the trainer's adapted ones"
    policy = policy_of(job, state)
    assert worst_difference(policy.actor.layers.q, actor.layers.q) > 1e-5
    assert worst_difference(policy.actor.layers.up, actor.layers.up) == 0.0


def test_a_mesh_and_rollouts_on_another_one_give_the_same_policy(world, config, actor):
    plain = train_on_policy(job_of(world, config, actor, GRPO(loss=KL), iterations=1), actor)
    mesh = make_mesh(2, 2, 2)
    there = make_mesh(1, 4, 2, jax.devices()[::-1])  # a slice may order its chips by the mesh's shape
    spread = place(actor, shardings(specs(config), mesh))
    job = job_of(world, config, spread, GRPO(loss=KL), mesh=mesh, there=there, iterations=1)
    found = train_on_policy(job, spread)
    assert {leaf.sharding.mesh for leaf in jax.tree.leaves(policy_of(job, found).actor)} == {there}
    assert worst_difference(plain.policy.weights, found.policy.weights) < 2e-4


def test_what_is_missing_is_refused(world, config, actor):
    with pytest.raises(InputError, match="PPO needs a value function"):
        train_on_policy(job_of(world, config, actor, PPO()), actor)
    bare = dataclasses.replace(job_of(world, config, actor, GRPO(loss=KL)), frozen=None)
    with pytest.raises(InputError, match="a KL term needs a reference"):
        train_on_policy(bare, actor)
    with pytest.raises(InputError, match="unknown advantage"):
        GRPO("best")
    with pytest.raises(InputError, match="unknown groups"):
        gatherer(world, config, "words")
    narrow = job_of(world, config, actor, GRPO(), prompt=2)
    with pytest.raises(InputError, match=r"no group fits the schedule; got \d+ groups, none within \(2, 6\)"):
        train_on_policy(narrow, actor)


def test_a_metric_that_is_not_finite_names_the_step(world, config, actor, tmp_path):
    value = init(critic_specs(config), jax.random.key(3))
    poisoned = value.replace(head=value.head.at[0].set(jnp.nan))
    with pytest.raises(InputError, match="diverged at step 1, on batch 0"):
        train_on_policy(job_of(world, config, actor, PPO()), actor, poisoned, Checkpointer(tmp_path))
    assert Checkpointer(tmp_path).latest() is None


def test_an_iteration_without_a_group_changes_nothing_and_goes_on(world, config, actor):
    job = dataclasses.replace(job_of(world, config, actor, GRPO(), iterations=1), reward_critic=None)
    judged = dataclasses.replace(job, gather=gatherer(world, config))  # all malformed: the judge finds them alike
    seen = []
    state = train_on_policy(judged, actor, report=lambda i, metrics: seen.append(metrics))
    assert [m["groups"] for m in seen] == [0.0]
    assert worst_difference(state.policy.weights, actor) == 0.0
