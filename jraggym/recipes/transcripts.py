"""Agents that learn from whole episodes of a tag protocol, from the warm start to the trained actor.

research_rl   GRPO on groups of 5, k3 in the loss, F1 or 0.1 behind the format gate    (ReSearch, arXiv 2503.19470)
search_r1     PPO with k1 in the reward, or GRPO; exact match, or form and evidence too (Search-R1, arXiv 2503.09516)

Where a paper and its published code differ, `variant` chooses: in the code, ReSearch gives nothing to an episode that
the model did not end, and Search-R1's PPO whitens advantages and fits its value over what searches brought, too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from jraggym import steps
from jraggym.data.plan import oracle
from jraggym.environment import outcome
from jraggym.episodes import Retriever
from jraggym.errors import InputError
from jraggym.experience import GRPO, PPO
from jraggym.metrics import bootstrap_interval
from jraggym.model_folder import Model
from jraggym.models.decoder import Decoder
from jraggym.onpolicy import OnPolicy, Schedule
from jraggym.protocols import PROTOCOLS
from jraggym.recipes.experiment import Experiment, Log, as_model, exam_split, placed_decoder
from jraggym.recipes.offline import fit_logged
from jraggym.recipes.online import adamw, learn
from jraggym.recipes.quickstart import Workshop, warm_start_data, warm_start_weights
from jraggym.recipes.settings import Settings
from jraggym.recipes.tags import NAMES, embedded, protocol_for, scripted_rows, tag_tokenizer
from jraggym.recipes.task import Task
from jraggym.retrieval.hybrid import BrokenRetriever, HybridRetriever
from jraggym.rewards import REWARDS, Reward
from jraggym.rewards.answer import em, hotpot_f1
from jraggym.sampling import Sampling
from jraggym.scripted import run_script
from jraggym.text.huggingface import HuggingFaceTokenizer
from jraggym.text.tokenizer import SentencePieceTokenizer
from jraggym.training import Optimization, Run
from jraggym.transcript_episode import Limits, TranscriptRules
from jraggym.transcript_gathering import TranscriptGatherer, as_finished, measures, prompt_ids
from jraggym.transcript_rollout import Engine, TranscriptRollout

PAPER = {"research_rl": "research_rl_paper"}  # rewards that the paper states otherwise than the code


def _one_of(what: str, got: str, known: Sequence[str]) -> None:
    if got not in known:
        raise InputError(f"unknown {what}", got=got, remedy=f"Use one of {', '.join(known)}.")


@dataclass(frozen=True)
class Tagged(Experiment):
    """The fields of all experiments in the words of a tag protocol."""

    protocol: str = "research_rl"
    """research_rl or search_r1."""
    settings: Settings = field(default_factory=lambda: Settings(edges=((40, 96), (40, 160), (40, 304))))
    limits: Limits = field(default_factory=lambda: Limits(turn=40, observation=56, total=224, prompt=40))
    """What an episode may use."""
    slots: int = 40
    """Episodes that run at the same time."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _one_of("protocol", self.protocol, NAMES)


@dataclass(frozen=True)
class Imitation(Tagged):
    """The warm start in a recipe's tags: SFT from scratch on deliberately poor scripted transcripts.

    `settings.faults` and `settings.closed_book` say how poor: answers after one hop, wrong relations, no search at all.
    """

    model: None = None
    tags: str = "single"
    """single: every tag is one token; several: the tokenizer does not know the tags."""
    optimization: Optimization = field(default_factory=lambda: Optimization(1_500, rate=6e-3, warmup=20))

    def __post_init__(self) -> None:
        super().__post_init__()
        _one_of("tags", self.tags, ("single", "several"))

    @property
    def title(self) -> str:
        return f"{self.protocol}, warm start"

    def tokenizer(self, task: Task, settings: Settings) -> SentencePieceTokenizer:
        return tag_tokenizer(task, settings, embedded(PROTOCOLS[self.protocol]), self.tags == "single")


@dataclass(frozen=True)
class Recipe(Tagged):
    """The fields of the recipes, whatever their algorithm."""

    model: Path = Path("runs/research-rl-start/model")
    """Folder of the starting actor."""
    reward: str = "research_rl"
    """A name in jraggym.rewards.REWARDS, such as search_r1_em or search_r1_format."""
    variant: str = "code"
    """paper or code, where they differ; see the top of this module."""
    mask: str = "model"
    """model: an objective reads what the model wrote; none: what searches brought, too (an ablation)."""
    retriever: str = "real"
    """real, or broken: random documents in training and evaluation (a control)."""
    questions: int = 32
    """Questions of an iteration, each asked `schedule.candidates` times."""
    schedule: Schedule = field(
        default_factory=lambda: Schedule(iterations=100, updates=2, rows=16, prompt=40, action=224, candidates=5)
    )
    optimization: Optimization = field(default_factory=lambda: adamw(5e-4))
    every: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        _one_of("reward", self.reward, list(REWARDS))
        _one_of("variant", self.variant, ("paper", "code"))
        _one_of("mask", self.mask, ("model", "none"))
        _one_of("retriever", self.retriever, ("real", "broken"))
        if self.schedule.prompt < self.limits.prompt:
            got = f"schedule.prompt {self.schedule.prompt} and limits.prompt {self.limits.prompt}"
            raise InputError("the schedule's prompts are too short", got=got, remedy="Raise schedule.prompt.")

    @property
    def title(self) -> str:
        how = type(self).__name__.removeprefix("Recipe").upper()
        switches = {"broken retriever": self.retriever == "broken", "no mask": self.mask == "none"}
        return ", ".join(
            (self.protocol, how, self.reward, self.variant, *(name for name, on in switches.items() if on))
        )


@dataclass(frozen=True)
class RecipeGrpo(Recipe):
    """A recipe with group-relative advantages."""

    algorithm: GRPO = field(default_factory=GRPO)


@dataclass(frozen=True)
class RecipePpo(Recipe):
    """A recipe with a value function that starts from the actor's trunk."""

    algorithm: PPO = field(default_factory=lambda: PPO(lam=1.0, reward_kl_weight=1e-3))
    value_optimization: Optimization = field(default_factory=lambda: adamw(1e-3))


def algorithm_of(experiment: RecipeGrpo | RecipePpo) -> GRPO | PPO:
    """The algorithm in the experiment's variant."""
    if isinstance(experiment, RecipeGrpo):
        return experiment.algorithm
    return replace(experiment.algorithm, leaky=experiment.variant == "code")


def reward_of(experiment: Recipe) -> Reward:
    """The reward in the experiment's variant."""
    name = experiment.reward
    return REWARDS[PAPER.get(name, name) if experiment.variant == "paper" else name]


def train_transcripts(
    experiment: Imitation | RecipeGrpo | RecipePpo, shop: Workshop, start: Model | None, log: Log
) -> tuple[Model, dict[str, Any]]:
    """Returns the actor and its evaluation: of a recipe its curve, the oracle and the broken retriever."""
    exam = TranscriptExam(experiment, shop)
    if isinstance(experiment, Imitation):
        return _imitate(experiment, shop, exam, log)
    assert start is not None
    ready = placed_decoder(experiment, shop, start.weights)
    job = OnPolicy(
        ready.net,
        algorithm_of(experiment),
        experiment.optimization,
        _gatherer(experiment, shop),
        experiment.schedule,
        ready.frozen,
        experiment.value_optimization if isinstance(experiment, RecipePpo) else None,
        seed=experiment.seed,
        mesh=ready.mesh,
    )
    used = exam.broken if experiment.retriever == "broken" else None
    model, result = learn(experiment, job, shop, ready, lambda actor: exam.score(actor, used), log)
    broken = exam.score(model.weights, exam.broken)
    del broken["each"]
    return model, {**result, "oracle": exam.oracle(), "broken_retriever": broken}


def _imitate(experiment: Imitation, shop: Workshop, exam: TranscriptExam, log: Log) -> tuple[Model, dict[str, Any]]:
    ready = placed_decoder(experiment, shop, warm_start_weights(shop))
    net = replace(ready.net, share=0.75)  # of a transcript much is what searches brought
    rows = scripted_rows(shop, protocol_for(experiment.protocol, shop.tokenizer))
    run = Run(
        steps.sft(net),
        experiment.optimization,
        warm_start_data(shop, rows),
        ready.frozen,
        experiment.seed,
        ready.mesh,
        steps.sft(net.plain),
    )
    trained = fit_logged(experiment, shop, run, ready.weights, log)
    actor = ready.whole(trained)
    result = {**exam.score(actor), "oracle": exam.oracle()}
    return as_model(shop, "actor", actor, result, ready.adapters(trained)), result


def _rollout(experiment: Tagged, shop: Workshop, retriever: HybridRetriever, temperature: float) -> TranscriptRollout:
    ends = shop.tokenizer.end_ids if isinstance(shop.tokenizer, HuggingFaceTokenizer) else ()
    protocol = protocol_for(experiment.protocol, shop.tokenizer)
    return TranscriptRollout(
        shop.config,
        TranscriptRules(protocol, shop.tokenizer, experiment.limits, frozenset(ends)),
        retriever,
        Sampling(temperature=temperature),
        Engine(slots=experiment.slots),
        mesh=experiment.devices.mesh(),
    )


def _gatherer(experiment: Recipe, shop: Workshop) -> TranscriptGatherer:
    settings, retriever = shop.settings, shop.train_retriever
    examples = shop.task.train.examples
    return TranscriptGatherer(
        _rollout(experiment, shop, retriever, settings.temperature),
        reward_of(experiment),
        examples[settings.demonstrations :] or examples,
        experiment.questions,
        shop.key("on-policy"),
        copies=experiment.schedule.candidates,
        masked=experiment.mask == "model",
        seed=settings.seed,
        retriever=BrokenRetriever(retriever, settings.seed) if experiment.retriever == "broken" else None,
    )


class TranscriptExam:
    """Greedy episodes on the experiment's held-out split."""

    def __init__(self, experiment: Tagged, shop: Workshop):
        self._split, self._retriever = exam_split(experiment, shop)
        self._protocol, self._seed = protocol_for(experiment.protocol, shop.tokenizer), experiment.seed
        self._turns, self._key = experiment.limits.turns, shop.key("test")
        self._rollout = _rollout(experiment, shop, self._retriever, 0.0)
        questions = [example.question for example in self._split.examples]
        self._prompts = [prompt_ids(shop.tokenizer, self._protocol, question) for question in questions]
        self.broken = BrokenRetriever(self._retriever, self._seed)

    def score(self, actor: Decoder, retriever: Retriever | None = None) -> dict[str, Any]:
        """EM with a 95 % bootstrap interval, `each`, F1, form, and searches by the number that a question needs."""
        examples = self._split.examples
        episodes, _ = self._rollout.run(actor, examples, self._prompts, self._key, retriever=retriever)
        finished = [as_finished(self._protocol, e, found) for e, found in zip(examples, episodes, strict=True)]
        right = np.array([em(f) for f in finished])
        return {
            **measures(finished),
            "em_interval": list(bootstrap_interval(right, seed=self._seed)),
            "each": "".join(str(int(x)) for x in right),
            "f1": float(np.mean([hotpot_f1(f) for f in finished])),
            "searches_by_need": self._by_need([float(len(f.documents)) for f in finished]),
            "em_by_need": self._by_need(right.tolist()),
            "questions": len(examples),
        }

    def oracle(self) -> float:
        """EM of the ceiling: the plan's searches, then the gold answer if its documents were found."""
        examples, plans = self._split.examples, self._split.plans
        budgets = [self._turns] * len(examples)
        found = run_script(
            examples, lambda i, state: oracle(examples[i], plans[examples[i].id], state), self._retriever, budgets
        )
        return float(np.mean([outcome(t.final, e)["em"] for t, e in zip(found, examples, strict=True)]))

    def _by_need(self, values: Sequence[float]) -> dict[str, float]:
        """Means over the questions that need one search, two ..."""
        by_need: dict[int, list[float]] = defaultdict(list)
        for example, value in zip(self._split.examples, values, strict=True):
            by_need[len(self._split.plans[example.id].queries)].append(value)
        return {str(need): float(np.mean(by_need[need])) for need in sorted(by_need)}
