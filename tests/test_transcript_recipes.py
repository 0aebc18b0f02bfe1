"""ReSearch and Search-R1 on the embedded world: scripts in tags, rewards in rows, runs that continue, and bad input."""

import re
from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest
from array_samples import worst_difference
from small_jobs import FEW, one_world, small  # noqa: F401 - a fixture
from toy_world import ToyTokenizer, toy_examples, toy_retriever

import eval.learning
import train.transcripts
from jraggym.checkpoint import Checkpointer
from jraggym.errors import InputError
from jraggym.experience import GRPO
from jraggym.model_folder import load_model
from jraggym.models.decoder import DecoderConfig, init, specs
from jraggym.objectives.policy import PolicyLoss
from jraggym.onpolicy import OnPolicy, Schedule, train_on_policy
from jraggym.protocols import PROTOCOLS, read_action
from jraggym.protocols.validity import letters
from jraggym.recipes.tags import embedded, scripted_transcript, tag_tokenizer, write_action
from jraggym.recipes.task import synthhop_task
from jraggym.recipes.transcripts import algorithm_of, reward_of, train_transcripts
from jraggym.retrieval.hybrid import BrokenRetriever
from jraggym.rewards import REWARDS
from jraggym.rewards.form import valid_sequence
from jraggym.rollout import Policy
from jraggym.sampling import Sampling
from jraggym.steps import Network
from jraggym.training import Optimization
from jraggym.transcript_episode import Limits, TranscriptEpisode, TranscriptRules
from jraggym.transcript_gathering import TranscriptGatherer, as_finished
from jraggym.transcript_rollout import Engine, TranscriptRollout
from jraggym.types import Answer, Document, Example, Search, Segment, State, Turn
from train.job import run_experiment

CONFIG = DecoderConfig(vocab=16, model=16, layers=1, query_heads=2, kv_heads=2, head_dim=8, feed_forward=32)
TOY = embedded(PROTOCOLS["search_r1"])
OPTIMIZATION = Optimization(1, matrix_rate=0.0, rate=3e-3, warmup=0, schedule="constant")
EXPERIMENTS = {name: experiment for name, (_, experiment) in train.transcripts.EXPERIMENTS.items()}


def by_length(finished):
    """A reward that every episode gets another value of."""
    return float(sum(len(text) for text in finished.turns))


@pytest.fixture(scope="module")
def actor():
    return init(specs(CONFIG), jax.random.key(0))


@pytest.fixture(scope="module")
def gather():
    limits = Limits(turns=3, searches=2, turn=5, observation=9, total=60, prompt=24)
    rules = TranscriptRules(TOY, ToyTokenizer(), limits, frozenset({1, 2}))
    rollout = TranscriptRollout(CONFIG, rules, toy_retriever(), Sampling(), Engine(slots=4, piece=4, rows=2))
    examples = toy_examples(5)
    return TranscriptGatherer(rollout, by_length, examples, 3, jax.random.key(1), copies=3)


# ---------------------------------------------------------------- scripts


@pytest.mark.parametrize("name", ["research_rl", "search_r1"])
@pytest.mark.parametrize("single", [True, False])
def test_a_scripted_transcript_is_in_good_form_whatever_tokens_its_tags_are(name, single):
    task, settings = synthhop_task(0, train=60, development=1, test=1), EXPERIMENTS["search-r1"].settings
    protocol = embedded(PROTOCOLS[name])
    tokenizer = tag_tokenizer(task, replace(settings, vocab=700), protocol, single)
    lengths = [len(ids) for ids in tokenizer.encode(protocol.tags)]
    assert all(length == 1 for length in lengths) if single else all(length > 2 for length in lengths), lengths
    page = Document("Bexlis", "Bexlis", "Bexlis is a city with mayor Torvan and twin <answer>Morn</answer>.")
    turns = (Turn(Search("Bexlis mayor"), (page,)), Turn(Search("Torvan spouse", "mayor Torvan"), ()))
    made = scripted_transcript(protocol, tokenizer, State("Who?", turns, "Ada Lind", "spouse Ada"))
    pieces = made.pieces(tokenizer.decode)
    assert letters(protocol, pieces) == "TSOTSOTA"
    example = Example("e", "Who?", ("Ada Lind",))
    episode = as_finished(protocol, example, TranscriptEpisode("e", made, pieces, True))
    assert valid_sequence(episode) == 1.0
    assert REWARDS["research_rl" if name == "research_rl" else "search_r1_format"](episode) == 1.0
    assert made.turn[made.segment == Segment.OBSERVATION].max() == 1
    assert len(made.prompt) < 40


@pytest.mark.parametrize("name", ["research_rl", "search_r1"])
@pytest.mark.parametrize("action", [Search("Bexlis mayor", "a thought"), Answer("Ada Lind", "spouse Ada Lind")])
def test_what_is_written_reads_back(name, action):
    assert read_action(PROTOCOLS[name], write_action(PROTOCOLS[name], action)) == action


def test_other_protocols_are_not_written():
    with pytest.raises(InputError, match="only turns of tags are written; got sections"):
        write_action(PROTOCOLS["sections"], Search("Bexlis"))


# ---------------------------------------------------------------- gathering


def test_every_question_is_a_row_with_the_reward_of_each_episode(gather, actor):
    found = gather(Policy(CONFIG, actor), 0)
    assert len(found.rows) == 3
    for row in found.rows:
        texts = [
            ToyTokenizer().decode([run])[0]
            for ids, mask in zip(row.actions, row.loss_masks, strict=True)
            for run in [own_runs(ids, mask)[-1]]
        ]
        assert all(reward >= len(text) for reward, text in zip(row.rewards, texts, strict=True))
        assert row.distinct == [True] * 3
        drawn = [[p != 0 for p in logprobs] for logprobs in row.logprobs]
        assert drawn == row.loss_masks
    rewards = [reward for row in found.rows for reward in row.rewards]
    assert found.metrics["episode_reward"] == pytest.approx(np.mean(rewards))
    assert found.tokens == sum(sum(mask) for row in found.rows for mask in row.loss_masks)
    names = {"em", "searches", "turns", "valid", "ended", "reward"}
    assert {f"episode_{name}" for name in names} | {"utilisation"} <= set(found.metrics)
    assert 0 < found.metrics["utilisation"] <= 1
    assert found.metrics["episode_searches"] > 0


def own_runs(ids, mask):
    """The stretches of ids in the mask."""
    change = np.flatnonzero(np.diff(np.array(mask, int))) + 1
    parts, kinds = np.split(np.array(ids), change), np.split(np.array(mask), change)
    return [part.tolist() for part, kind in zip(parts, kinds, strict=True) if kind[0]]


def test_gathering_is_a_pure_function_of_policy_and_iteration(gather, actor):
    policy = Policy(CONFIG, actor)
    first, again, later = (gather(policy, iteration) for iteration in (1, 1, 2))
    assert first == again
    assert first.rows != later.rows


def test_without_the_mask_observations_are_learnt_and_nothing_else_changes(gather, actor):
    policy = Policy(CONFIG, actor)
    masked, bare = gather(policy, 0), replace(gather, masked=False)(policy, 0)
    assert [row.actions for row in bare.rows] == [row.actions for row in masked.rows]
    assert all(all(mask) for row in bare.rows for mask in row.loss_masks)
    assert not all(all(mask) for row in masked.rows for mask in row.loss_masks)
    assert bare.tokens == masked.tokens, "what a search brings is never sampled"


def test_a_broken_retriever_takes_the_place_of_the_real_one(gather, actor):
    policy, real = Policy(CONFIG, actor), toy_retriever()
    broken = replace(gather, retriever=BrokenRetriever(real, 1))(policy, 0)
    assert broken.rows != gather(policy, 0).rows
    assert gather.rollout.compilations == 1


class Killed(Exception):
    pass


def test_a_killed_run_on_transcripts_ends_with_the_same_bits(gather, actor, tmp_path):
    schedule = Schedule(iterations=2, updates=1, rows=3, prompt=24, action=72, candidates=3)
    algorithm = GRPO(loss=PolicyLoss(kl_weight=1e-3))
    job, seen = OnPolicy(Network(CONFIG), algorithm, OPTIMIZATION, gather, schedule, actor), []
    start = partial(train_on_policy, job, actor, every=1)
    whole = start(checkpointer=Checkpointer(tmp_path / "whole"), report=lambda i, metrics: seen.append(metrics))
    assert max(m["sampler_gap_max"] for m in seen) < 1e-4, seen
    assert [m["too_long"] for m in seen] == [0.0, 0.0]

    def kill(iteration, metrics):
        if iteration == 2:
            raise Killed

    with pytest.raises(Killed):
        start(checkpointer=Checkpointer(tmp_path / "killed"), report=kill)
    assert worst_difference(whole, start(checkpointer=Checkpointer(tmp_path / "killed"))) == 0.0
    assert worst_difference(whole.policy.weights, actor) > 1e-4


# ---------------------------------------------------------------- the entry


def test_from_the_warm_start_to_ppo(tmp_path):
    limits = Limits(turns=2, searches=1, turn=8, observation=56, total=152, prompt=64)
    shared = {"limits": limits, "slots": 4}
    start = small(EXPERIMENTS["search-r1-start"], tmp_path / "start", optimization=FEW, **shared)
    found = run_experiment(start, train_transcripts)
    assert found["experiment"] == "search_r1, warm start"
    assert found["oracle"] < 1.0, "two turns are too few for many questions"
    assert set(found["searches_by_need"]) <= {"1", "2", "3"}
    schedule = Schedule(iterations=2, updates=1, rows=2, prompt=64, action=152, candidates=2)
    recipe = small(
        EXPERIMENTS["search-r1-ppo"],
        tmp_path / "ppo",
        **{"model": tmp_path / "start" / "model", "questions": 2, "schedule": schedule, "every": 2},
        **{"optimization": FEW, "value_optimization": FEW, **shared},
    )
    found = run_experiment(recipe, train_transcripts)
    assert found["experiment"] == "search_r1, PPO, search_r1_em, code"
    assert [point["iteration"] for point in found["curve"]] == [0, 2]
    assert [len(point["each"]) for point in found["curve"]] == [6, 6]
    assert found["curve"][1]["sampled_tokens"] > 0
    assert {"em", "searches"} <= set(found["broken_retriever"])
    assert eval.learning.read(tmp_path / "ppo").em.shape == (2, 6), "curves can be laid together"
    assert load_model(tmp_path / "ppo" / "model", "actor").about["iteration"] == 2


def test_titles_tell_ablations_and_controls_apart():
    recipe = EXPERIMENTS["research-rl"]
    assert recipe.title == "research_rl, GRPO, research_rl, code"
    assert replace(recipe, mask="none", retriever="broken").title.endswith("code, broken retriever, no mask")


@pytest.mark.parametrize("name", list(EXPERIMENTS))
def test_a_config_says_how_it_is_run_and_what_it_should_give(name):
    module = getattr(train.transcripts, name.replace("-", "_"))
    assert re.search(rf"^command   python -m train\.transcripts {name} ", module.__doc__, re.MULTILINE)
    assert re.search(r"^hardware  .+\nexpected  .+$", module.__doc__, re.MULTILINE)


def test_research_and_search_r1_have_their_published_numbers():
    research, grpo, ppo = (EXPERIMENTS[name] for name in ("research-rl", "search-r1", "search-r1-ppo"))
    for recipe in (research, grpo):
        assert recipe.schedule.candidates == 5
        assert (recipe.algorithm.loss.kl, recipe.algorithm.loss.kl_weight) == ("k3", 1e-3)
    assert (ppo.algorithm.gamma, ppo.algorithm.lam) == (1.0, 1.0)
    assert (ppo.algorithm.reward_kl, ppo.algorithm.reward_kl_weight, ppo.algorithm.loss.kl_weight) == ("k1", 1e-3, 0.0)


def test_variants_differ_where_paper_and_code_do():
    for variant, leaky, reward in (("paper", False, "research_rl_paper"), ("code", True, "research_rl")):
        research, grpo, ppo = (
            replace(EXPERIMENTS[name], variant=variant) for name in ("research-rl", "search-r1", "search-r1-ppo")
        )
        assert reward_of(research) is REWARDS[reward]
        assert reward_of(ppo) is REWARDS["search_r1_em"]
        assert algorithm_of(ppo) == replace(ppo.algorithm, leaky=leaky)
        assert algorithm_of(grpo) == grpo.algorithm


@pytest.mark.parametrize(
    ("name", "field", "value", "told"),
    [
        ("research-rl", "reward", "best", "unknown reward"),
        ("research-rl", "mask", "all", "unknown mask"),
        ("search-r1", "variant", "arxiv", "unknown variant"),
        ("search-r1", "retriever", "slow", "unknown retriever"),
        ("search-r1", "protocol", "sections", "unknown protocol"),
        ("search-r1-start", "tags", "none", "unknown tags"),
        ("search-r1-start", "evaluate", "train", "unknown split"),
        ("search-r1-ppo", "schedule", Schedule(prompt=8), "the schedule's prompts are too short"),
    ],
)
def test_bad_input_is_refused(name, field, value, told):
    with pytest.raises(InputError, match=told):
        replace(EXPERIMENTS[name], **{field: value})


def test_there_is_no_episode_without_questions(gather):
    with pytest.raises(InputError, match="there is no episode to train on; got 0 examples"):
        replace(gather, examples=())
