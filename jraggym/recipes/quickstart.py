"""The main job: questions in, a trained and measured search agent out (Re2Search++'s shape: DPO actor + critic).

    demonstrations -> SFT warm start -> collect labelled candidates -> SFT on good actions | DPO
                                   collect again with the DPO actor -> critic

Every stage is a pure function of the settings and leaves its result in `out`, so a job that is called again
goes on where it stopped. Controls get the same data and steps with rewards dealt at random.
"""

from __future__ import annotations

import dataclasses
import functools
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from jax.sharding import Mesh

from jraggym import steps
from jraggym.batch import ProcessBatch
from jraggym.collection import collect
from jraggym.data.lazy import Items, Lazy, chosen
from jraggym.data.plan import demonstrate
from jraggym.data.process import ChunkStore, ProcessRecord, Provenance, batches, build_dataset
from jraggym.episodes import Rules
from jraggym.errors import InputError
from jraggym.hosts import lead_first, surveyed
from jraggym.models.critic import Critic, critic_specs
from jraggym.models.decoder import Decoder, DecoderConfig, init, specs
from jraggym.models.induction import with_induction_head
from jraggym.objectives.pairs import POSITIVE
from jraggym.recipes.bench import Bench, record_row, stored_rows, usable
from jraggym.recipes.settings import Settings
from jraggym.recipes.task import Task
from jraggym.retrieval.hybrid import HybridRetriever
from jraggym.rollout import Policy, Rollout
from jraggym.sampling import Sampling
from jraggym.scripted import run_script
from jraggym.sharding import batch_sharding, own_rows, place_rows, split_over
from jraggym.text.actions import format_action
from jraggym.text.batching import EMPTY_ROW, Batches, Row, buckets, collate
from jraggym.text.rendering import render_document
from jraggym.text.tokenizer import SentencePieceTokenizer
from jraggym.training import BatchSource, Run
from jraggym.types import Answer, Search, Trajectory


@dataclass(frozen=True)
class Workshop(Bench):
    """What all stages in a world share: the task and its retrievers, beside what training takes."""

    task: Task
    train_retriever: HybridRetriever
    test_retriever: HybridRetriever
    development_retriever: HybridRetriever | None


def train_tokenizer(task: Task, settings: Settings) -> SentencePieceTokenizer:
    """SentencePiece on the training split's own text: paragraphs, questions and the actions of the plans."""
    split = task.train
    texts = [render_document(document) for document in split.corpus.documents]
    for example in split.examples[:6_000]:
        plan = split.plans[example.id]
        texts += [example.question, format_action(Answer(plan.answer))]
        texts += [format_action(Search(query)) for query in plan.queries]
    return SentencePieceTokenizer.train(texts, settings.vocab)


def warm_start(shop: Workshop, rows: Sequence[Row]) -> Decoder:
    """SFT from scratch on imperfect demonstrations, whole episodes at a time."""
    run = Run(imitation(shop.config), shop.settings.warm_start, warm_start_data(shop, rows))
    return shop.fit("warm start", warm_start_weights(shop), run)


def warm_start_weights(shop: Workshop) -> Decoder:
    """Random weights with a rough induction head."""
    return with_induction_head(init(specs(shop.config), shop.key("actor")), shop.config)


def warm_start_data(shop: Workshop, rows: Sequence[Row]) -> Batches:
    """Whole episodes, the short ones first."""
    return _whole_episodes(shop, rows, shop.settings.short_first)


def warm_longer(shop: Workshop, warm: Decoder, rows: Sequence[Row]) -> Decoder:
    """The control for the actors: as many more steps, with the same optimiser, on demonstrations."""
    data = _whole_episodes(shop, rows, short_first=0)
    return shop.fit("warm start trained longer", warm, Run(imitation(shop.config), shop.settings.actor, data))


def imitate(shop: Workshop, warm: Decoder, data: BatchSource) -> Decoder:
    """SFT on the positively labelled candidates."""
    return shop.fit("SFT on good actions", warm, Run(imitation(shop.config, 1.0), shop.settings.actor, data))


def optimise_preferences(shop: Workshop, name: str, warm: Decoder, data: BatchSource) -> Decoder:
    """DPO with the warm start as reference."""
    objective = preference(shop.config, shop.settings)
    return shop.fit(name, warm, Run(objective, shop.settings.actor, data, frozen=warm))


def demonstrations(shop: Workshop) -> list[Row]:
    """Rows of the scripted episodes: one for each, in a chat one for each of its actions."""
    pairs = scripted(shop)
    codecs = {budget: dataclasses.replace(shop.codec, max_turns=budget) for budget, _ in pairs}
    return fitting(shop, [row for budget, episode in pairs for row in codecs[budget].imitations(episode.final)])


def scripted(shop: Workshop) -> list[tuple[int, Trajectory]]:
    """Imperfect episodes over the training world, each with its budget of turns."""
    settings, split = shop.settings, shop.task.train
    examples = split.examples[: settings.demonstrations]
    rngs = [random.Random(f"{settings.seed}/{example.id}") for example in examples]
    budgets = [1 if rng.random() < settings.closed_book else settings.max_turns for rng in rngs]

    def script(i: int, state):
        last = len(state.turns) + 1 >= budgets[i]
        return demonstrate(split.plans[examples[i].id], state, settings.faults, rngs[i], last_turn=last)

    return list(zip(budgets, run_script(examples, script, shop.train_retriever, budgets), strict=True))


def _whole_episodes(shop: Workshop, rows: Sequence[Row], short_first: int) -> Batches:
    settings = shop.settings
    shapes = buckets(settings.edges, settings.tokens, candidates=1)
    return Batches(rows, shapes, candidates=1, seed=settings.seed, short_first=short_first)


def fitting(shop: Workshop, rows: Sequence[Row]) -> list[Row]:
    """The rows that the largest bucket holds; InputError when that loses more than a tenth of them."""
    edge = shop.settings.edges[-1]
    kept = [row for row in rows if row.sizes[0] <= edge[0] and row.sizes[1] <= edge[1]]
    if len(kept) < 0.9 * len(rows):
        raise InputError(
            "most demonstrations must fit the largest bucket",
            got=f"{len(kept)} of {len(rows)} within {edge} tokens",
            remedy="Raise `edges`.",
        )
    return kept


def imitation(config: DecoderConfig, share: float = 0.5):
    """The SFT objective; at most `share` of the action positions are the policy's own (else the loss is NaN)."""
    return steps.sft(steps.Network(config, share=share))


def preference(config: DecoderConfig, settings: Settings):
    """The DPO objective."""
    return steps.dpo(steps.Network(config), beta=settings.beta, nll=settings.nll, below=settings.below)


def ranking(config: DecoderConfig, settings: Settings):
    """The critic's objective; no centring, since the scores hold log-probabilities."""
    return steps.critic(steps.Network(config), below=settings.below, centre=0.0, pointwise=settings.pointwise)


def collect_round(
    shop: Workshop, name: str, actor: Decoder, examples: Sequence, rollout: Rollout
) -> list[ProcessRecord]:
    """K labelled candidates for every state of the questions' episodes, stored as a dataset under `out`/data/`name`."""
    settings = shop.settings
    folder = shop.out / "data" / name
    store = ChunkStore(folder / "chunks", {"name": name, "settings": settings.fingerprint(), "task": shop.task.name})
    provenance = Provenance(name, "support_judge", "bm25+dense", settings.seed)
    records = collect(
        rollout,
        Policy(shop.config, actor),
        examples,
        shop.key(name),
        store,
        provenance,
        chunk=4 * settings.episodes,
        report=lambda done: shop.progress(name, done, len(examples), None),
    )
    found = list(records)
    return list(lead_first(lambda: build_dataset(folder / "dataset", found)))


def collector(shop: Workshop, select: str = "reward", mesh: Mesh | None = None) -> Rollout:
    """The rollout of a collection: the judge ranks K samples, and by default the best is executed."""
    settings = shop.settings
    sampling = Sampling(settings.candidates, settings.max_action, settings.temperature)
    rules = Rules(settings.max_turns, select, shop.task.judge, seed=settings.seed)
    slots = split_over(mesh, settings.episodes)
    return Rollout(shop.config, shop.codec, shop.train_retriever, sampling, rules, batch=slots, mesh=mesh)


def labelled(shop: Bench, records: Items[ProcessRecord], *, shuffle: bool = False):
    """Batches of the states with a preference, through grain.

    `shuffle` deals each state's rewards anew among its distinct candidates: the control.
    """
    rows = preferences(shop, records)
    dealt = Lazy(len(rows), lambda i: _dealt(rows[i], f"{shop.settings.seed}/{i}"))
    return shuffled(shop, dealt if shuffle else rows)


def preferences(shop: Bench, records: Items[ProcessRecord]) -> Items[Row]:
    """The states with a good candidate beside a worse one; InputError when there is none."""
    useful = stored_rows(records, functools.partial(_row, shop))
    if not useful:
        raise InputError(
            "no state has a good candidate beside a worse one",
            got=f"{len(records)} states",
            remedy="Train the warm start longer, or collect more questions.",
        )
    return useful


def shuffled(shop: Bench, rows: Items[Row]):
    """Endless batches of the rows, through grain."""
    settings = shop.settings
    to_batch = functools.partial(batch_of, shop)
    return batches(rows, batch_size=settings.states, seed=settings.seed, to_batch=to_batch)


def batch_of(shop: Bench, rows: Sequence[Row]) -> ProcessBatch:
    """A batch of these rows."""
    sizes = shop.settings
    return collate(rows, prompt=sizes.max_prompt, action=sizes.max_action, candidates=sizes.contrasts)


def batches_in_order(shop: Bench, rows: Items[Row], size: int, mesh: Mesh | None) -> Iterator[ProcessBatch]:
    """The rows as batches of `size` on the mesh, the last one filled up with empty rows.

    Each process reads and builds the rows of its own devices.
    """
    where = None if mesh is None else batch_sharding(mesh)
    for at in range(0, len(rows), size):
        own = range(size) if where is None else own_rows(where, size)
        part = batch_of(shop, [rows[at + int(i)] if at + i < len(rows) else EMPTY_ROW for i in own])
        yield part if where is None else place_rows(part, where, size)


def successful(records: Items[ProcessRecord]) -> Items[ProcessRecord]:
    """The states of episodes with outcome F1 > 0.75, from which RAG-Gym's actors learn; all if there is none."""
    outcomes = surveyed(len(records), lambda i: records[i].f1)
    return chosen(records, [i for i, f1 in enumerate(outcomes) if f1 > 0.75]) or records


def _row(shop: Bench, record: ProcessRecord) -> Row | None:
    """The record's distinct candidates, good and frequent ones first, or None unless good and worse are among them."""
    fit = usable(shop, record)
    labels = {c.text: c.reward for c in fit if c.reward is not None}
    often = [text for text, _ in Counter(c.text for c in fit).most_common() if text in labels]
    good = [text for text in often if labels[text] > POSITIVE]
    worse = [text for text in often if labels[text] <= POSITIVE]
    if not good or not worse:
        return None
    good = good[: shop.settings.contrasts - 1]
    texts = good + worse[: shop.settings.contrasts - len(good)]
    return record_row(shop.codec, record, texts, [labels[text] for text in texts])


def _dealt(row: Row, seed: str) -> Row:
    places = [i for i, counts in enumerate(row.distinct) if counts]
    values = [row.rewards[i] for i in places]
    random.Random(seed).shuffle(values)
    rewards = list(row.rewards)
    for place, value in zip(places, values, strict=True):
        rewards[place] = value
    return dataclasses.replace(row, rewards=rewards)


def train_critic(
    shop: Workshop, name: str, actor: Decoder, records: Items[ProcessRecord], shuffle: bool = False
) -> Critic:
    """A critic that starts from the actor's trunk."""
    start = dataclasses.replace(init(critic_specs(shop.config, likelihood=True), shop.key("critic")), trunk=actor)
    objective = ranking(shop.config, shop.settings)
    return shop.fit(name, start, Run(objective, shop.settings.critic, labelled(shop, records, shuffle=shuffle)))
