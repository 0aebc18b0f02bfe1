"""Episodes per second of `TranscriptRollout` beside loops that prefill whole transcripts anew in every turn.

    python3 -m venv ../tunix && . ../tunix/bin/activate && pip install -e '.[test]' 'google-tunix>=0.1.7,<0.2'
    python tests/benchmarks/episodes.py [--models small large] [--questions 64] [--group 4] [--peers hf tunix]

Search-R1's protocol and its budgets (observations of 500 tokens, 1 to 5 turns), BM25 and TF-IDF on the synthhop test
world. All sides have the same random weights (float32, from a seed), prompts, stop strings, retriever, number of
threads and process. The loops are what public recipes do: in each turn every open transcript, padded on the left, goes
through `generate` in batches; what is drawn and what is found are appended as ids, and finished episodes leave the
batch. `hf` is Hugging Face `generate`, `tunix` google-tunix's vanilla sampler (left out with --peers hf, where it is
not installed).

Random weights end no turn: a schedule, drawn from the seed, says how many tokens each turn has and which turn is the
last; all others are read as a search for the question and their text. A sampled stop token ends a turn, too. Each loop
runs at the batch that is fastest for it; first runs, which compile or warm up, are left out, and the fastest of the
repeats counts. At temperature 0 all sides must draw the same: how many turns agree is printed. Nothing is asserted:
the figures depend on the machine. On a busy one, seconds of CPU say more than the clock does.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
import torch
import tyro
from episodes_peers import Generate, hf_generate, tunix_generate

from jraggym import transcript_episodes
from jraggym.data.synthhop import make_world
from jraggym.model_folder import Model
from jraggym.models.decoder import Decoder, DecoderConfig, init, specs
from jraggym.porting.pretrained import export_model
from jraggym.protocols import SEARCH_R1, observation, opening, plain
from jraggym.retrieval.corpus import Corpus
from jraggym.retrieval.encoder import TfidfEncoder
from jraggym.retrieval.hybrid import HybridRetriever
from jraggym.sampling import Sampling
from jraggym.sharding import make_mesh
from jraggym.text.rendering import neutralise
from jraggym.text.tokenizer import SentencePieceTokenizer
from jraggym.transcript_episode import Limits, OpenEpisode, TranscriptEpisode, TranscriptRules
from jraggym.transcript_rollout import Engine, Report, TranscriptRollout
from jraggym.types import Action, Answer, Example, Search, Segment

PEERS: dict[str, Callable[..., Generate]] = {"hf": hf_generate, "tunix": tunix_generate}
SHAPES = {
    "small": {},
    "large": {"model": 384, "layers": 6, "query_heads": 6, "kv_heads": 2, "head_dim": 64, "feed_forward": 1024},
}


@dataclass(frozen=True)
class Config:
    """What is run; lengths are in tokens."""

    models: tuple[str, ...] = ("small", "large")
    peers: tuple[str, ...] = ("hf", "tunix")
    questions: int = 64
    group: int = 4  # episodes of each question
    turns: int = 5  # an episode has 1 to as many: Search-R1's four searches, and the answer
    shortest: int = 16  # turn
    longest: int = 44
    documents: int = 24  # short ones, until an observation is full
    found: int = 500  # tokens of an observation at most, as Search-R1 has it
    temperature: float = 1.0
    batches: tuple[int, ...] = (16, 64)  # of the loops: the fastest is taken
    loop_questions: int = 64  # of the loops' timed runs
    agreement: int = 8  # questions of the comparison at temperature 0
    growth: int = 8  # questions of each row of the table of prefilled tokens; 0: no table
    growth_turns: int = 8  # its rows
    repeats: int = 2
    threads: int = 2
    devices: int = 2  # of jax, for our rollout: a loop runs on one core
    seed: int = 0
    engine: Engine = field(default_factory=lambda: Engine(slots=32))


@dataclass(frozen=True)
class Schedule:
    """How many tokens each turn of each episode has, int [E, turns], and how many turns the episode has, int [E]."""

    lengths: np.ndarray
    turns: np.ndarray


@dataclass(frozen=True)
class Case:
    """What all sides share."""

    config: Config
    model: DecoderConfig
    weights: Decoder
    tokenizer: SentencePieceTokenizer
    retriever: HybridRetriever
    examples: tuple[Example, ...]
    prompts: tuple[tuple[int, ...], ...]
    schedule: Schedule

    @property
    def stops(self) -> list[int]:
        """The stop strings, which are one token each here."""
        return [self.tokenizer.token_id(stop) for stop in SEARCH_R1.stops]

    def read(self, episode: int, turn: int, text: str) -> Action:
        """The action of an episode's turn, counted from 1: a search for its question and whatever was written."""
        if turn >= self.schedule.turns[episode]:
            return Answer("none")
        printable = "".join(char for char in text if char.isprintable())
        return Search(neutralise(f"{self.examples[episode].question} {printable}"))

    @property
    def limits(self) -> Limits:
        config, prompt = self.config, max(map(len, self.prompts))
        total = prompt + config.turns * (config.longest + config.found)
        return Limits(config.turns + 1, config.turns + 1, config.longest, config.found, total, prompt)


@dataclass
class Loop:
    """What a loop computed: `fed` counts prefilled tokens without padding."""

    drawn: int = 0
    fed: int = 0
    transcripts: list[list[int]] = field(default_factory=list)
    turns: list[list[list[int]]] = field(default_factory=list)


@dataclass(frozen=True)
class Run:
    """What a call gave; on a busy machine its seconds of CPU say more than the clock."""

    seconds: float
    cpu: float
    result: Any


def make_case(config: Config, shape: str) -> Case:
    """The synthhop test world in groups, with a tokenizer, a retriever and random weights."""
    world = make_world("test", config.seed, questions=config.questions)
    corpus = Corpus.from_documents(world.documents)
    texts = [plain(opening(SEARCH_R1, example.question)) for example in world.examples]
    tokenizer = SentencePieceTokenizer.train([*corpus.texts(), *texts[:4]], 1024)
    model = DecoderConfig(vocab=tokenizer.vocab_size, **SHAPES[shape])
    weights = init(specs(model), jax.random.key(config.seed))
    retriever = HybridRetriever(corpus, TfidfEncoder.fit(corpus.texts()), k=config.documents)
    grouped = [i for i in range(config.questions) for _ in range(config.group)]
    ids = tokenizer.encode(texts)
    rng = np.random.default_rng(config.seed)
    schedule = Schedule(
        rng.integers(config.shortest, config.longest + 1, (len(grouped), config.turns)),
        rng.integers(1, config.turns + 1, len(grouped)),
    )
    examples, prompts = tuple(world.examples[i] for i in grouped), tuple(tuple(ids[i]) for i in grouped)
    return Case(config, model, weights, tokenizer, retriever, examples, prompts, schedule)


# ---------------------------------------------------------------- ours


def make_ours(case: Case, temperature: float) -> Callable[[int], tuple[list[TranscriptEpisode], Report]]:
    """Runs the episodes of the first questions."""

    class Scheduled(OpenEpisode):
        def read(self, text: str) -> Action:
            return case.read(self.number, self.turns, text)

        @property
        def room(self) -> int:
            return int(case.schedule.lengths[self.number, self.turns])

    rules = TranscriptRules(SEARCH_R1, case.tokenizer, case.limits)
    mesh = make_mesh(data=case.config.devices) if case.config.devices > 1 else None
    rollout = TranscriptRollout(
        case.model, rules, case.retriever, Sampling(temperature=temperature), case.config.engine, mesh=mesh
    )

    def run(questions: int) -> tuple[list[TranscriptEpisode], Report]:
        n = questions * case.config.group
        with mock.patch.object(transcript_episodes, "OpenEpisode", Scheduled):
            return rollout.run(case.weights, case.examples[:n], case.prompts[:n], jax.random.key(1))

    return run


# ---------------------------------------------------------------- the loops


def run_loop(case: Case, generate: Generate, questions: int, batch: int) -> Loop:
    """The episodes of the first questions, turn by turn."""
    count = questions * case.config.group
    loop = Loop(transcripts=[list(p) for p in case.prompts[:count]], turns=[[] for _ in range(count)])
    still, turn = list(range(count)), 0
    while still:
        for start in range(0, len(still), batch):
            rows = still[start : start + batch]
            limits = [int(case.schedule.lengths[i, turn]) for i in rows]
            loop.fed += sum(len(loop.transcripts[i]) for i in rows)
            for i, ids in zip(rows, generate([loop.transcripts[i] for i in rows], limits), strict=True):
                loop.transcripts[i] += ids
                loop.turns[i].append(ids)
                loop.drawn += len(ids)
        turn += 1
        texts = case.tokenizer.decode([loop.turns[i][-1] for i in still])
        actions = [case.read(i, turn, text) for i, text in zip(still, texts, strict=True)]
        searches = [(i, a) for i, a in zip(still, actions, strict=True) if isinstance(a, Search)]
        still = [i for i, _ in searches]
        found = retrieve(case, [a.query for _, a in searches])
        for i, documents in zip(still, found, strict=True):
            loop.transcripts[i] += case.tokenizer.encode([observation(SEARCH_R1, documents)])[0][: case.config.found]
    return loop


def retrieve(case: Case, queries: Sequence[str]) -> list:
    """The documents of each query; as many queries at a time as there are slots, so that it compiles once."""
    size = case.config.engine.slots
    padded = [*queries, *[""] * (-len(queries) % size)]
    found = [hits for i in range(0, len(padded), size) for hits in case.retriever(padded[i : i + size])]
    return found[: len(queries)]


def time_loop(case: Case, generate: Generate) -> tuple[Run, int]:
    """The fastest run at the fastest batch; all shapes have been run before."""
    tries = {}
    for batch in case.config.batches:
        call = partial(run_loop, case, generate, case.config.loop_questions, batch)
        call()
        tries[batch] = timed(call)
    batch = min(tries, key=lambda b: tries[b].seconds)
    call = partial(run_loop, case, generate, case.config.loop_questions, batch)
    return fastest([tries[batch], *(timed(call) for _ in range(case.config.repeats - 1))]), batch


# ---------------------------------------------------------------- all


def timed(call: Callable[[], Any]) -> Run:
    start, cpu = time.perf_counter(), time.process_time()
    result = call()
    return Run(time.perf_counter() - start, time.process_time() - cpu, result)


def fastest(runs: Sequence[Run]) -> Run:
    return min(runs, key=lambda run: run.seconds)


def compare(case: Case, folder: Path) -> None:
    """Prints a row for each side."""
    config, call = case.config, partial(make_ours(case, case.config.temperature), case.config.questions)
    first, ours = timed(call), fastest([timed(call) for _ in range(config.repeats)])
    episodes, report = ours.result
    n, drawn = len(episodes), report.drawn
    observed = sum((e.transcript.segment == Segment.OBSERVATION).sum() for e in episodes)
    prompt, found = np.mean([*map(len, case.prompts)]), observed / sum(len(e.queries) for e in episodes)
    print(f"  {n} episodes of {case.schedule.turns.mean():.2f} turns and {drawn / n:.0f} drawn tokens;", end=" ")
    print(f"prompts of {prompt:.0f}, observations of {found:.0f} tokens")
    print(
        f"  slots in use {report.utilisation:.1%} of {report.steps} steps; {report.blocks} blocks of prefill;", end=" "
    )
    print(f"first call {first.seconds:.1f} s, of which {first.seconds - ours.seconds:.1f} s compile")
    head = f"{'batch':>6}{'seconds':>9}{'CPU s':>8}{'episodes/s':>12}{'drawn/s':>9}{'prefilled/episode':>19}"
    print(f"  {'':<10}{head}{'ratio':>7}{'of CPU s':>10}")
    _row("jraggym", config.engine.slots, ours, ours, (n, n), drawn, report.prefilled)
    for name in config.peers:
        run, batch = time_loop(case, PEERS[name](case, folder, config.temperature))
        loop = run.result
        _row(name, batch, run, ours, (len(loop.transcripts), n), loop.drawn, loop.fed)


def _row(name: str, batch: int, run: Run, ours: Run, episodes: tuple[int, int], drawn: int, fed: int) -> None:
    n, share = episodes[0], episodes[1] / episodes[0]
    rates = f"{run.seconds:>9.2f}{run.cpu:>8.2f}{n / run.seconds:>12.2f}{drawn / run.seconds:>9,.0f}{fed / n:>19,.0f}"
    ratios = f"{share * run.seconds / ours.seconds:>7.1f}{share * run.cpu / ours.cpu:>10.1f}"
    print(f"  {name:<10}{batch:>6}{rates}{ratios}", flush=True)


def agree(case: Case, folder: Path) -> None:
    """At temperature 0: how many turns are the same, and how many first ones."""
    questions = min(case.config.agreement, case.config.questions)
    episodes, _ = make_ours(case, 0.0)(questions)
    ours = [e.transcript for e in episodes]
    for name in case.config.peers:
        loop = run_loop(case, PEERS[name](case, folder, 0.0), questions, case.config.batches[0])
        same = [
            [(t.ids[(t.segment == Segment.MODEL) & (t.turn == i)]).tolist() == ids for i, ids in enumerate(turns)]
            for t, turns in zip(ours, loop.turns, strict=True)
        ]
        firsts, alike = sum(turns[0] for turns in same), sum(map(sum, same))
        print(f"  greedy, {name}: {firsts} of {len(same)} first turns are the same,", end=" ")
        print(f"{alike} of all {sum(map(len, same))}", flush=True)


def growth(case: Case) -> None:
    """The table of tokens prefilled per episode, against the turns of each episode."""
    print(f"\ntokens prefilled per episode\n  {'turns':>6}{'jraggym':>10}{'anew in every turn':>20}{'ratio':>7}")
    run, planned = make_ours(case, case.config.temperature), case.schedule.turns.copy()
    for turns in range(1, case.config.turns + 1):
        case.schedule.turns[:] = turns
        episodes, report = run(case.config.growth)
        anew = [
            int((t.turn < i).sum() if i else len(t.prompt))
            for t in (e.transcript for e in episodes)
            for i in range(turns)
        ]
        n = len(episodes)
        print(f"  {turns:>6}{report.prefilled / n:>10,.0f}{sum(anew) / n:>20,.0f}{sum(anew) / report.prefilled:>7.1f}")
    case.schedule.turns[:] = planned


def main() -> None:
    """Prints what was run, then the comparison of each model, then the table."""
    config = tyro.cli(Config, description=__doc__)
    if hasattr(os, "sched_setaffinity"):  # before jax starts, whose threads are as many as the cores it may use
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: config.threads])
    jax.config.update("jax_num_cpu_devices", config.devices)
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    print(f"{config}\ntorch {torch.__version__}, jax {jax.__version__} on {jax.default_backend()}")
    for shape in config.models:
        case = make_case(config, shape)
        count = sum(leaf.size for leaf in jax.tree.leaves(case.weights))
        print(f"\n{shape}: {count / 1e6:.1f} M weights, {case.model}")
        with tempfile.TemporaryDirectory() as name:
            export_model(Model("actor", case.model, case.tokenizer, case.weights, {}), Path(name) / "model")
            compare(case, Path(name) / "model")
            if config.agreement:
                agree(case, Path(name) / "model")
    if config.growth:
        growth(make_case(replace(config, turns=config.growth_turns), config.models[0]))


if __name__ == "__main__":
    main()
