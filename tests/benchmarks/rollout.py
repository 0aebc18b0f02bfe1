"""Actions per second of the jitted batched rollout beside a loop over questions that calls Hugging Face `generate`.

    python tests/benchmarks/rollout.py [--questions 32] [--loop-questions 4] [--candidates 8] [--turns 3]

Both run on CPU with the same threads, random weights (float32, from a seed), tokenizer, retriever, questions of the
synthhop test world and number of new tokens; the best of the repeats counts. The loop is the usual agent code in
torch: one question at a time, K samples of each state by `num_return_sequences`. Random weights write no valid
actions, so whatever either side writes is read as a search for that text: every action is paid for in full, and so
is retrieval on every turn but the last. At K = 1 both decode greedily and must take the same first actions; how many
agree is printed. Nothing is asserted: the figures depend on the machine, and on a busy one torch suffers most.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import tyro
from transformers import AutoModelForCausalLM

from jraggym.data.synthhop import make_world
from jraggym.environment import transition, wants_retrieval
from jraggym.model_folder import Model
from jraggym.models.decoder import Decoder, DecoderConfig, init, prefix_forward, specs
from jraggym.porting.pretrained import export_model
from jraggym.retrieval.corpus import Corpus
from jraggym.retrieval.encoder import TfidfEncoder
from jraggym.retrieval.hybrid import HybridRetriever
from jraggym.rollout import Policy, Rollout, Rules
from jraggym.sampling import Sampling, sample
from jraggym.text.actions import format_action, parse_action
from jraggym.text.batching import Codec
from jraggym.text.rendering import neutralise
from jraggym.text.tokenizer import SentencePieceTokenizer
from jraggym.types import Document, Example, Search, State, Trajectory


@dataclass(frozen=True)
class Config:
    """Sizes; the model is the default tiny one. `prompt` and `tokens` are in tokens."""

    questions: int = 32  # of the jitted rollout, which runs them as one batch
    loop_questions: int = 4  # of the loop
    candidates: int = 8
    turns: int = 3
    repeats: int = 2
    agreement: int = 16  # questions whose first greedy actions are compared
    tokens: int = 20
    prompt: int = 256
    threads: int = 2
    seed: int = 0


class EverySearch(SentencePieceTokenizer):
    """Reads any output as a search for its text."""

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        return [format_action(Search(_plain(text))) for text in super().decode(ids)]


def _plain(text: str) -> str:
    return neutralise("".join(char for char in text if char.isprintable())).strip() or "nothing"


@dataclass(frozen=True)
class Case:
    """What both sides share."""

    config: Config
    model: DecoderConfig
    weights: Decoder
    codec: Codec
    retriever: HybridRetriever
    examples: tuple[Example, ...]


@dataclass(frozen=True)
class Result:
    """Sampled actions, and the seconds that they took."""

    actions: int
    seconds: float
    generation: float  # seconds in generation alone


def make_case(config: Config) -> Case:
    """The synthhop test world with a tokenizer, a BM25 + TF-IDF retriever and random weights."""
    world = make_world("test", config.seed, questions=config.questions)
    corpus = Corpus.from_documents(world.documents)
    tokenizer = EverySearch.train([*corpus.texts(), *(e.question for e in world.examples)], 1024)
    model = DecoderConfig(vocab=tokenizer.vocab_size)
    weights = init(specs(model), jax.random.key(config.seed))
    retriever = HybridRetriever(corpus, TfidfEncoder.fit(corpus.texts()), k=2)
    return Case(config, model, weights, Codec(tokenizer, config.turns, config.prompt), retriever, world.examples)


# ---------------------------------------------------------------- ours


def run_jitted(case: Case, sampling: Sampling) -> tuple[Result, list[Trajectory]]:
    """The best of the repeats, and the episodes."""
    rules = Rules(max_turns=case.config.turns)
    rollout = Rollout(case.model, case.codec, case.retriever, sampling, rules, batch=len(case.examples))
    policy = Policy(case.model, case.weights)

    def run() -> list[Trajectory]:
        return list(rollout.run(policy, case.examples, jax.random.key(1)))

    print(f"\nK = {sampling.candidates}: first call, with compilation, in {timed(run)[0]:.1f} s")
    seconds, trajectories = best(run, case.config.repeats)
    steps = [step for trajectory in trajectories for step in trajectory.steps]
    generation = time_generation(case, sampling, [step.state for step in steps])
    return Result(len(steps) * sampling.candidates, seconds, generation), trajectories


def time_generation(case: Case, sampling: Sampling, states: list[State]) -> float:
    """Seconds of prefill and sampling alone, over the states of a rollout in batches of its size."""

    @jax.jit
    def generate(weights: Decoder, prompt: Any, mask: Any, keys: Any) -> Any:
        prefix = prefix_forward(weights, case.model, prompt, mask)
        return sample(weights, case.model, sampling, prefix, prompt[:, -1], jnp.array(case.codec.stops), keys).tokens

    b, p = len(case.examples), case.config.prompt
    batches = []
    for start in range(0, len(states), b):
        ids, mask = np.zeros((b, p), np.int32), np.arange(p) == np.full((b, 1), p - 1)
        for row, state in enumerate(states[start : start + b]):
            prompt = case.codec.prompt(state)
            ids[row, p - len(prompt) :], mask[row, p - len(prompt) :] = prompt, True
        batches.append((ids, mask, jax.random.split(jax.random.key(start), b)))
    generate(case.weights, *batches[0]).block_until_ready()

    def run() -> None:
        for batch in batches:
            generate(case.weights, *batch).block_until_ready()

    return best(run, case.config.repeats)[0]


# ---------------------------------------------------------------- the loop


def to_torch(case: Case) -> Any:
    """The same model in transformers, by way of its exported folder."""
    model = Model("actor", case.model, case.codec.tokenizer, case.weights, {})
    with tempfile.TemporaryDirectory() as folder:
        export_model(model, Path(folder) / "model")
        return AutoModelForCausalLM.from_pretrained(Path(folder) / "model").eval()


def run_loop(case: Case, generate: Callable[[State], list[str]]) -> Result:
    """The best of the repeats, after one call to warm up."""
    generate(State(case.examples[0].question))
    results = [loop(case, generate) for _ in range(case.config.repeats)]
    fastest = min(result.seconds for result in results)
    return Result(results[0].actions, fastest, min(result.generation for result in results))


def loop(case: Case, generate: Callable[[State], list[str]]) -> Result:
    """One question at a time, one `generate` for each state; the first candidate is executed."""
    generation, actions = 0.0, 0
    begin = time.perf_counter()
    for example in case.examples[: case.config.loop_questions]:
        state = State(example.question)
        while not state.done:
            spent, texts = timed(partial(generate, state))
            generation, actions = generation + spent, actions + len(texts)
            action = parse_action(texts[0])
            documents: tuple[Document, ...] = ()
            if isinstance(action, Search) and wants_retrieval(state, action, case.config.turns):
                documents = case.retriever([action.query])[0]
            state = transition(state, action, documents, max_turns=case.config.turns)
    return Result(actions, time.perf_counter() - begin, generation)


def make_generate(case: Case, model: Any, sampling: Sampling) -> Callable[[State], list[str]]:
    """K texts of a state by Hugging Face `generate`."""
    greedy = sampling.temperature == 0
    options = {"do_sample": False} if greedy else {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    stops = set(case.codec.stops)

    @torch.inference_mode()
    def generate(state: State) -> list[str]:
        prompt = torch.tensor([case.codec.prompt(state)])
        found = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=sampling.max_tokens,
            num_return_sequences=sampling.candidates,
            eos_token_id=list(case.codec.stops),
            pad_token_id=case.codec.tokenizer.pad_id,
            **options,
        )
        rows = found[:, prompt.shape[1] :].tolist()
        ends = [next((i + 1 for i, token in enumerate(row) if token in stops), len(row)) for row in rows]
        return case.codec.tokenizer.decode([row[:end] for row, end in zip(rows, ends, strict=True)])

    return generate


# ---------------------------------------------------------------- both


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def best(call: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """The fewest seconds of the repeats, and the last result."""
    runs = [timed(call) for _ in range(repeats)]
    return min(seconds for seconds, _ in runs), runs[-1][1]


def compare(case: Case, model: Any, sampling: Sampling) -> None:
    """Prints actions per second of both sides, the whole and generation alone; greedy, also how often they agree."""
    ours, trajectories = run_jitted(case, sampling)
    generate = make_generate(case, model, sampling)
    theirs = run_loop(case, generate)
    print(f"  {'actions/s':<24}{'whole rollout':>16}{'generation alone':>20}")
    for name, result in (("jitted, one batch", ours), ("generate in a loop", theirs)):
        whole, alone = result.actions / result.seconds, result.actions / result.generation
        print(f"  {name:<24}{whole:>16,.1f}{alone:>20,.1f}   of {result.actions} actions")
    whole = ours.actions / ours.seconds * theirs.seconds / theirs.actions
    alone = ours.actions / ours.generation * theirs.generation / theirs.actions
    print(f"  {'ratio':<24}{whole:>16,.1f}{alone:>20,.1f}")
    if sampling.temperature == 0:
        pairs = list(zip(case.examples, trajectories, strict=True))[: case.config.agreement]
        same = sum(generate(State(e.question))[0] == t.steps[0].candidates[0].text for e, t in pairs)
        print(f"  first greedy actions that agree: {same} of {len(pairs)}")


def main() -> None:
    """Prints what was run, then both comparisons."""
    config = tyro.cli(Config, description=__doc__)
    if hasattr(os, "sched_setaffinity"):  # before jax starts, whose threads are as many as the cores it may use
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: config.threads])
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    case = make_case(config)
    print(
        f"{config}\n{case.model}\nrandom weights, every output read as a search, {len(case.retriever.corpus)} documents"
    )
    print(f"torch {torch.__version__}, jax {jax.__version__} on {jax.default_backend()}")
    model = to_torch(case)
    compare(case, model, Sampling(candidates=config.candidates, max_tokens=config.tokens))
    compare(case, model, Sampling(candidates=1, max_tokens=config.tokens, temperature=0.0))


if __name__ == "__main__":
    main()
