"""Rollouts of transcripts: the cache across turns is exact, and an episode does not depend on its neighbours."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from toy_world import ToyTokenizer, toy_examples, toy_retriever

from jraggym.models import slots
from jraggym.models.decoder import DecoderConfig, init, specs
from jraggym.objectives.forward import token_logprobs
from jraggym.protocols.protocol import observation
from jraggym.protocols.search_r1 import SEARCH_R1
from jraggym.sampling import Sampling
from jraggym.sharding import make_mesh, place, shardings
from jraggym.text.batching import collate
from jraggym.text.grouping import group
from jraggym.transcript_episode import Limits, TranscriptRules
from jraggym.transcript_rollout import Engine, TranscriptRollout
from jraggym.types import Segment

CONFIG = DecoderConfig(vocab=16, model=16, layers=2, query_heads=2, kv_heads=2, head_dim=8, feed_forward=32)
ENDS = (1, 2)
LIMITS = Limits(turns=5, searches=3, turn=5, observation=9, total=64, prompt=12)
KEY = jax.random.key(3)
EXAMPLES = tuple(example for example in toy_examples(5) for _ in range(3))  # groups of three
PROMPTS = [[3 + (7 * i + j) % 13 for j in range(6 + i % 5)] for i in range(5) for _ in range(3)]
ENGINE = Engine(slots=4, piece=3, rows=2, width=4)


@pytest.fixture(scope="module")
def actor():
    return init(specs(CONFIG), jax.random.key(0))


def make(engine=ENGINE, limits=LIMITS, protocol=SEARCH_R1, config=CONFIG, digest=None, mesh=None):
    rules = TranscriptRules(protocol, ToyTokenizer(), limits, frozenset(ENDS), digest)
    return TranscriptRollout(config, rules, toy_retriever(), Sampling(), engine, mesh=mesh)


@pytest.fixture(scope="module")
def rollout():
    return make()


@pytest.fixture(scope="module")
def found(rollout, actor):
    return rollout.run(actor, EXAMPLES, PROMPTS, KEY)


def view(episodes):
    return [
        (e.example_id, e.transcript.ids.tolist(), e.transcript.segment.tolist(), e.queries, e.ended) for e in episodes
    ]


def test_what_the_trainer_computes_is_what_the_sampler_drew_across_turns_and_observations(actor, found):
    episodes, _ = found
    kinds = {int(s) for e in episodes for s in e.transcript.segment}
    assert kinds >= {Segment.PROMPT, Segment.MODEL, Segment.OBSERVATION, Segment.INVALID}
    assert max(int(e.transcript.turn.max()) for e in episodes) >= 3
    assert gap(actor, CONFIG, episodes) < 1e-5


def gap(actor, config, episodes):
    """How far the trainer's log-probabilities are from the sampler's."""
    compute = jax.jit(lambda batch: token_logprobs(actor, config, batch))
    gaps = []
    for transcript in (episode.transcript for episode in episodes):
        batch = collate([group([transcript], [0.0])], prompt=12, action=64, candidates=1)
        computed = np.asarray(compute(batch))[0, 0, : len(transcript.response)]
        gaps.append(np.abs(computed - transcript.response.logprob).max())
    return max(gaps)


@pytest.mark.parametrize("rows", [1, 2])
def test_texts_of_many_chunks_under_local_attention(monkeypatch, rows):
    monkeypatch.setattr(slots, "CHUNK", 8)
    config = replace(CONFIG, layers=3, local=(True, False, True), window=11)
    actor = init(specs(config), jax.random.key(2))
    rollout = make(replace(ENGINE, rows=rows), config=config)
    episodes, _ = rollout.run(actor, EXAMPLES, PROMPTS, KEY)
    assert max(len(e.transcript) for e in episodes) > 40
    assert gap(actor, config, episodes) < 1e-5


def test_a_digest_stands_where_documents_would(actor):
    protocol = replace(SEARCH_R1, digests=True)
    rollout = make(protocol=protocol, digest=lambda question, query, documents: f"{query}: {len(documents)}")
    episodes, _ = rollout.run(actor, EXAMPLES, PROMPTS, KEY)
    shown = [
        (e.transcript.ids[e.transcript.segment == Segment.OBSERVATION].tolist(), e.queries)
        for e in episodes
        if e.queries
    ]
    assert shown
    for ids, queries in shown:
        expected = [observation(protocol, (), f"{query}: 2") for query in queries]
        assert ids == [i for text in ToyTokenizer().encode(expected) for i in text[: LIMITS.observation]]


def test_an_episode_in_a_batch_equals_the_same_one_alone(rollout, actor, found):
    episodes, _ = found
    alone = make(Engine(slots=1, piece=5, rows=1, width=16))
    for i in (0, 4, 8, 14):
        first = i - i % 3  # a copy's name says which copy it is
        single, _ = alone.run(actor, EXAMPLES[first : i + 1], PROMPTS[first : i + 1], KEY)
        assert view(single[-1:]) == view(episodes[i : i + 1])
    assert alone.compilations == 1


@pytest.mark.parametrize("shape", [(2, 2, 1), (2, 1, 2), (2, 2, 2)])
def test_episodes_on_a_mesh_are_those_of_one_device(actor, found, shape):
    mesh = make_mesh(*shape)
    placed = place(actor, shardings(specs(CONFIG), mesh))
    rollout = make(replace(ENGINE, slots=8), mesh=mesh)
    episodes, report = rollout.run(placed, EXAMPLES, PROMPTS, KEY)
    assert view(episodes) == view(found[0])
    assert report.drawn == found[1].drawn
    assert rollout.compilations == 1
