"""What the rollout records of a candidate is what the trainer computes for it."""

import jax
import numpy as np
import pytest

from jraggym.data.synthhop import make_world
from jraggym.episodes import Episodes
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


def test_recorded_logprobs_and_scores_are_those_of_the_training_forward(subwords, monkeypatch):
    examples, tokenizer, retriever = subwords
    config = DecoderConfig(tokenizer.vocab_size, model=16, query_heads=2, kv_heads=2, head_dim=8, feed_forward=32)
    actor, critic = init(specs(config), jax.random.key(2)), init(critic_specs(config), jax.random.key(3))
    codec, sampled, act = Codec(tokenizer, 3, 64), {}, Episodes.act

    def keep(self, turn, rows, tokens, mask, *rest):
        sampled[turn] = [
            [row[m].tolist() for row, m in zip(*group, strict=True)] for group in zip(tokens, mask, strict=True)
        ]
        return act(self, turn, rows, tokens, mask, *rest)

    monkeypatch.setattr(Episodes, "act", keep)
    sampling = Sampling(candidates=4, max_tokens=4, temperature=0.7, top_p=0.95)
    rollout = Rollout(config, codec, retriever, sampling, Rules(max_turns=3), batch=12)
    rows, recorded, same = [], [], []
    for i, trajectory in enumerate(rollout.run(Policy(config, actor, critic), examples, jax.random.key(5))):
        for turn, step in enumerate(trajectory.steps):
            rows.append(codec.row(step.state, [c.text for c in step.candidates], [0.0] * 4))
            recorded.append([(c.logprob, c.score) for c in step.candidates])
            same.append([ours == theirs for ours, theirs in zip(rows[-1].actions, sampled[turn][i], strict=True)])
    longest = max(row.sizes[1] for row in rows)
    batch = collate(rows, prompt=64, action=longest, candidates=4)
    logprob = jax.jit(token_logprobs, static_argnums=1)(actor, config, batch).sum(-1)
    score = jax.jit(candidate_scores, static_argnums=1)(critic, config, batch)
    again, noted = np.array(same), np.array(recorded)
    assert again.sum() >= 20, f"only {again.sum()} of {again.size} texts give their own tokens again"
    np.testing.assert_allclose(np.asarray(logprob)[again], noted[again][:, 0], atol=1e-4)
    np.testing.assert_allclose(np.asarray(score)[again], noted[again][:, 1], atol=1e-4)
