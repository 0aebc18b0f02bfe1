"""What the rollout records of a candidate is what the trainer computes for it."""

import jax
import numpy as np
import pytest

from jraggym.data.synthhop import make_world
from jraggym.models.critic import critic_specs
from jraggym.models.decoder import DecoderConfig, init, specs
from jraggym.objectives.forward import candidate_scores, token_logprobs
from jraggym.retrieval.corpus import Corpus
from jraggym.retrieval.hybrid import HybridRetriever
from jraggym.rollout import Policy, Rollout, Rules
from jraggym.sampling import Sampling
from jraggym.text.batching import Codec, collate
from jraggym.text.rendering import render
from jraggym.text.tokenizer import SentencePieceTokenizer
from jraggym.types import State


@pytest.fixture(scope="module")
def subwords():
    """A real tokenizer and corpus, small."""
    world = make_world("development", 0, questions=12)
    texts = [segment for e in world.examples for segment in render(State(e.question), 3)]
    texts += [document.text for document in world.documents[:200]]
    corpus = Corpus.from_documents(world.documents[:200])
    return world.examples, SentencePieceTokenizer.train(texts, 1200), HybridRetriever(corpus, k=2)


def test_recorded_logprobs_and_scores_are_those_of_the_training_forward(subwords):
    examples, tokenizer, retriever = subwords
    config = DecoderConfig(tokenizer.vocab_size, model=16, query_heads=2, kv_heads=2, head_dim=8, feed_forward=32)
    actor, critic = init(specs(config), jax.random.key(2)), init(critic_specs(config), jax.random.key(3))
    codec, sampling = Codec(tokenizer, 3, 64), Sampling(candidates=4, max_tokens=4, temperature=0.7, top_p=0.95)
    rollout = Rollout(config, codec, retriever, sampling, Rules(max_turns=3), batch=12)
    steps = [s for t in rollout.run(Policy(config, actor, critic), examples, jax.random.key(5)) for s in t.steps]
    rows = [codec.samples(step.state, step.candidates) for step in steps]
    batch = collate(rows, prompt=64, action=4, candidates=4)
    logprob = np.asarray(jax.jit(token_logprobs, static_argnums=1)(actor, config, batch))
    score = np.asarray(jax.jit(candidate_scores, static_argnums=1)(critic, config, batch))
    assert batch.action_mask.sum() > 20 * len({len(c.tokens) for step in steps for c in step.candidates})
    np.testing.assert_allclose(logprob[batch.action_mask], batch.behaviour_logprob[batch.action_mask], atol=1e-4)
    np.testing.assert_allclose(score, [[c.score for c in step.candidates] for step in steps], atol=1e-4)
    totals = [[c.logprob for c in step.candidates] for step in steps]
    np.testing.assert_allclose(logprob.sum(-1), totals, atol=1e-4)
