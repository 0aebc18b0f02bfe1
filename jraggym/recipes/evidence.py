"""Evidence search as a job: simulated episodes -> labelled choices -> a critic -> all-gold recall beside its controls.

Every agent reads the same number of documents. A question counts when all of its supporting documents were read.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from jraggym import steps
from jraggym.checkpoint import Checkpointer
from jraggym.data.questions import QuestionSet
from jraggym.evidence.episodes import Budget, Choose, Lookup, complete, read_ids, search_evidence, unread
from jraggym.evidence.proposals import Proposal
from jraggym.evidence.training import Choice, PairBatches, collect_choices
from jraggym.models.bert_critic import BertCritic, PairScorer, PairTokenizer, new_critic
from jraggym.models.bert_encoder import BertEncoder
from jraggym.retrieval.encoder import embed
from jraggym.retrieval.hybrid import HybridRetriever
from jraggym.training import Optimization, Run, fit
from jraggym.types import Document, Example, State

Progress = Callable[[str, int, int, Any], None]


@dataclass(frozen=True)
class EvidenceSettings:
    """Everything that decides the numbers."""

    searches: int = 4
    documents: int = 5  # of a search, none of them read before
    together: int = 5  # proposals that a search carries out, whose documents are read in turn
    depth: int = 100  # candidates of either ranking before they are fused
    rounds: int = 4  # simulated episodes of each training question
    states: int = 8  # of a batch
    contrasts: int = 8  # proposals of a state in a batch
    epochs: float = 1.0
    limit: int = 64  # tokens of (question, why)
    around: int = 6  # words on either side of a name that the critic reads
    frozen: int = 3  # of the trunk's layers: these do not learn, nor do the embeddings
    optimization: Optimization = field(
        default_factory=lambda: Optimization(1, matrix_rate=0.0, rate=1e-4, warmup=20, schedule="linear", decay=0.01)
    )  # its steps follow from the epochs

    @property
    def budget(self) -> Budget:
        """Of an episode."""
        return Budget(self.searches, self.documents, self.together, self.around)


class Searcher:
    """A retriever that embeds each query once, and remembers what it found."""

    def __init__(self, retriever: HybridRetriever):
        self._retriever = retriever
        self._found: dict[tuple[str, int], tuple[Document, ...]] = {}

    def __call__(self, queries: Sequence[str], k: int) -> list[tuple[Document, ...]]:
        """The k best documents of each query."""
        new = [query for query in dict.fromkeys(queries) if (query, k) not in self._found]
        if new:
            encoder = self._retriever.encoder
            vectors = np.zeros((len(new), 0), np.float32) if encoder is None else embed(encoder.query, new)
            for query, hits in zip(new, self._retriever.search(new, vectors, k), strict=True):
                self._found[query, k] = hits
        return [self._found[query, k] for query in queries]


def in_two_ways(questions: Collection[str], whole: Lookup, names: Lookup) -> Lookup:
    """Searches `questions` by `whole`, and all other queries, which are about a name, by `names`.

    A name that comes twice in its query weighs more in BM25 and blurs the query's vector, so that fusing both rankings
    loses what BM25 finds; a whole question is found best by both.
    """

    def lookup(queries: Sequence[str], k: int) -> list[Sequence[Document]]:
        found: dict[str, Sequence[Document]] = {}
        for search, wanted in ((whole, True), (names, False)):
            if part := [query for query in queries if (query in questions) == wanted]:
                found |= dict(zip(part, search(part, k), strict=True))
        return [found[query] for query in queries]

    return lookup


def train_critic(
    choices: Sequence[Choice],
    encoder: BertEncoder,
    settings: EvidenceSettings,
    seed: int,
    checkpointer: Checkpointer | None = None,
    progress: Progress | None = None,
) -> tuple[BertCritic, PairTokenizer]:
    """Fine-tunes the encoder's trunk with a new head on whole rankings (Plackett-Luce) of the choices."""
    tokenize = PairTokenizer.of(encoder, settings.limit)
    batches = PairBatches(choices, tokenize, settings.states, settings.contrasts, seed=seed)
    total = max(1, round(settings.epochs * len(choices) / settings.states))
    optimization = dataclasses.replace(settings.optimization, steps=total)
    objective = steps.pair_critic(encoder.query.config, settings.frozen, pairwise=0.0, listwise=1.0)
    weights = new_critic(encoder, jax.random.key(seed))

    def report(step: int, metrics: Mapping[str, Any]) -> None:
        if progress is not None:
            progress("critic", step, total, metrics)

    return fit(Run(objective, optimization, batches, seed=seed), weights, checkpointer, report=report), tokenize


def by_critic(scorer: PairScorer) -> Choose:
    """Proposals by falling score; of equal ones the first comes first."""

    def choose(states: Sequence[State], offered: Sequence[Sequence[Proposal]]) -> list[list[int]]:
        pairs = [[(s.question, p.why) for p in proposals] for s, proposals in zip(states, offered, strict=True)]
        scores = iter(scorer([pair for row in pairs for pair in row]))
        return [np.argsort([-next(scores) for _ in row], kind="stable").tolist() for row in pairs]

    return choose


def at_random(seed: int) -> Choose:
    """The random-critic control; a draw depends on the seed, the question and the step alone."""

    def choose(states: Sequence[State], offered: Sequence[Sequence[Proposal]]) -> list[list[int]]:
        return [
            random.Random(f"{seed}/{state.question}/{len(state.turns)}").sample(range(len(offer)), len(offer))
            for state, offer in zip(states, offered, strict=True)
        ]

    return choose


def the_first(states: Sequence[State], offered: Sequence[Sequence[Proposal]]) -> list[list[int]]:
    """Always the first proposals."""
    return [list(range(len(proposals))) for proposals in offered]


def by_oracle(examples: Sequence[Example], lookup: Lookup, settings: EvidenceSettings) -> Choose:
    """A greedy ceiling: one after another, the proposal whose documents add most to the evidence so far."""

    def choose(states: Sequence[State], offered: Sequence[Sequence[Proposal]]) -> list[list[int]]:
        found = iter(lookup([p.query for proposals in offered for p in proposals], settings.budget.read))
        orders = []
        for example, state, proposals in zip(examples, states, offered, strict=True):
            hits = [unread(state, next(found))[: settings.budget.share] for _ in proposals]
            missing = set(example.support) - read_ids(state)
            brings = [missing & {document.id for document in documents} for documents in hits]
            orders.append(_greedy(brings, settings.together))
        return orders

    return choose


def _greedy(brings: Sequence[set[str]], number: int) -> list[int]:
    """Up to `number` of them, each the one that adds most to those before; ties go to the first."""
    order: list[int] = []
    while len(order) < min(number, len(brings)):
        known = {one for i in order for one in brings[i]}
        left = [i for i in range(len(brings)) if i not in order]
        order.append(max(left, key=lambda i: len(brings[i] - known)))
    return order


def recall(questions: QuestionSet, lookup: Lookup, choose: Choose, settings: EvidenceSettings) -> np.ndarray:
    """1 for each question whose evidence was read whole, else 0: f64 [questions].

    An episode ends once it is: more documents would change nothing, and most of the time would go into scoring them.
    """
    states = search_evidence(questions.examples, lookup, choose, settings.budget, until=complete)
    return np.array([float(complete(s, e)) for s, e in zip(states, questions.examples, strict=True)])


def single_shot(questions: QuestionSet, lookup: Lookup, settings: EvidenceSettings) -> np.ndarray:
    """The same for one search with the question that reads as many documents."""
    found = lookup([example.question for example in questions.examples], settings.budget.read)
    rows = zip(questions.examples, found, strict=True)
    return np.array([float(set(example.support) <= {document.id for document in hits}) for example, hits in rows])


def choices_of(
    questions: QuestionSet, lookup: Lookup, settings: EvidenceSettings, seed: int, progress: Progress | None = None
) -> list[Choice]:
    """The labelled choices of simulated episodes on training questions."""

    def report(done: int, total: int) -> None:
        if progress is not None:
            progress("label", done, total, None)

    return collect_choices(
        questions.examples, lookup, settings.budget, rounds=settings.rounds, seed=seed, report=report
    )
