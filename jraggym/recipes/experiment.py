"""What every training experiment has in common: the world, the devices, the network and the final measurement."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import jax
from jax import Array
from jax.sharding import Mesh

from jraggym.errors import InputError
from jraggym.hosts import Hosts
from jraggym.metrics import bootstrap_interval
from jraggym.model_folder import Model
from jraggym.models.critic import Critic, critic_specs
from jraggym.models.decoder import Decoder, init, specs
from jraggym.models.lora import Lora, lora_specs, merge
from jraggym.porting.peft import PeftAdapters
from jraggym.recipes.bench import Bench
from jraggym.recipes.quickstart import Workshop, train_tokenizer
from jraggym.recipes.rows import Agent, Evaluator
from jraggym.recipes.settings import Settings
from jraggym.recipes.task import Split, Task
from jraggym.retrieval.hybrid import HybridRetriever
from jraggym.sharding import make_mesh, place, shardings
from jraggym.steps import Network
from jraggym.text.tokenizer import SentencePieceTokenizer

Log = Callable[[str, int, Mapping[str, Any]], None]  # (group, step, metrics)
SPLITS = ("development", "test")
AGENTS = "agents"  # the `dataset` of what needs no world


@dataclass(frozen=True)
class Devices:
    """The mesh: rows over data and fsdp, widths over fsdp, heads and vocabulary over tensor."""

    data: int = 1
    fsdp: int = 1
    tensor: int = 1

    def mesh(self) -> Mesh | None:
        """None for a single device of a single process."""
        sizes = (self.data, self.fsdp, self.tensor)
        return None if sizes == (1, 1, 1) and jax.process_count() == 1 else make_mesh(*sizes)


@dataclass(frozen=True)
class Experiment:
    """The fields of all experiments."""

    out: Path
    """Folder of checkpoints, metrics and the final model; an unfinished job is continued."""
    seed: int = 0
    """Decides the world, the initial weights and every draw."""
    dataset: str = "synthhop"
    """synthhop (made up, embedded), hotpotqa (needs --data-dir and the `offline` extra), or agents: their chats, which
    bring all that SFT, DPO or a critic learns from, and no world to be evaluated in (eval.qa does that)."""
    data_dir: Path | None = None
    """Folder with the official HotpotQA json files."""
    settings: Settings = field(default_factory=Settings)
    """The world and the shapes of batches and rollouts."""
    lora: Lora = field(default_factory=lambda: Lora(rank=0))
    """With a rank above 0 adapters are trained instead of all weights; the model that is written has them merged."""
    parts: int = 1
    """Micro-batches of an update."""
    devices: Devices = field(default_factory=Devices)
    hosts: Hosts = field(default_factory=Hosts)
    every: int = 100
    """Steps (on-policy: iterations) between checkpoints."""
    evaluate: str = "development"
    """Split of the greedy evaluation; tune on development, look at test once."""
    wandb: str | None = None
    """Weights & Biases project; metrics always go to OUT/tensorboard."""
    of_chats: ClassVar[bool] = False  # can it learn from them?

    def __post_init__(self) -> None:
        if self.evaluate not in SPLITS:
            raise InputError("unknown split", got=self.evaluate, remedy=f"Use one of {', '.join(SPLITS)}.")

    @property
    def title(self) -> str:
        """What results are listed under; runs of one title differ in their seed."""
        return type(self).__name__.upper()

    @property
    def worldless(self) -> bool:
        """Whether it learns from an agent's chats, which bring all that it needs beside the starting model."""
        given = getattr(self, "model", None), getattr(self, "data", None)
        return self.of_chats and self.dataset == AGENTS and None not in given

    def tokenizer(self, task: Task, settings: Settings) -> SentencePieceTokenizer:
        """The tokenizer of a run that has no starting model."""
        return train_tokenizer(task, settings)

    def seeded(self) -> Settings:
        """The settings under this experiment's seed."""
        return dataclasses.replace(self.settings, seed=self.seed)


@dataclass(frozen=True)
class Placed:
    """A decoder made ready for training: what is trained, what is frozen, and on which devices."""

    net: Network
    weights: Any  # all weights, or adapters
    frozen: Decoder  # the start: reference policy, and base of the adapters
    mesh: Mesh | None

    def whole(self, weights: Any) -> Decoder:
        """Plain decoder weights from trained ones."""
        return weights if self.net.lora is None else merge(self.frozen, weights, self.net.lora)

    def adapters(self, weights: Any, head: Any = None) -> PeftAdapters | None:
        """The trained weights where they are adapters, with a critic's head."""
        return None if self.net.lora is None else PeftAdapters(self.net.lora, weights, head)


def placed_decoder(experiment: Experiment, shop: Bench, start: Decoder) -> Placed:
    """The start on its devices, with fresh adapters under LoRA."""
    mesh, table, frozen = experiment.devices.mesh(), specs(shop.config), start
    lora = experiment.lora if experiment.lora.rank else None
    net = Network(shop.config, lora, experiment.parts, mesh)
    if mesh is not None:
        frozen = place(start, shardings(table, mesh))
    if lora is None:
        return Placed(net, frozen, frozen, mesh)
    pairs = lora_specs(shop.config, lora)
    adapters = init(pairs, shop.key("adapters"))
    return Placed(net, place(adapters, shardings(pairs, mesh)) if mesh else adapters, frozen, mesh)


def critic_table(net: Network, *, likelihood: bool = False) -> Any:
    """The table of what is trained of a critic or a value function: under LoRA the trunk's adapters, and the head."""
    table: Any = critic_specs(net.config, likelihood=likelihood)
    return table if net.lora is None else dataclasses.replace(table, trunk=lora_specs(net.config, net.lora))


def critic_on(ready: Placed, table: Any, key: Array) -> Critic:
    """A fresh head of `critic_table` on the trunk that is there, on the trunk's devices."""

    def head(key: Array) -> Critic:  # under jit the trunk, which would fill a device, is not drawn
        return dataclasses.replace(init(table, key), trunk=None)

    critic = jax.jit(head)(key)
    if ready.mesh is not None:
        critic = place(critic, shardings(dataclasses.replace(table, trunk=None), ready.mesh))
    return dataclasses.replace(critic, trunk=ready.weights)


def exam_split(experiment: Experiment, shop: Workshop) -> tuple[Split, HybridRetriever]:
    """The split that the experiment is evaluated on."""
    if experiment.evaluate == "test":
        return shop.task.test, shop.test_retriever
    assert shop.development_retriever is not None
    return shop.task.development, shop.development_retriever


class Exam:
    """Greedy evaluation on the experiment's split, on the mesh that the weights are on."""

    def __init__(self, experiment: Experiment, shop: Workshop, mesh: Mesh | None):
        self._evaluator, self._seed = Evaluator(shop, *exam_split(experiment, shop), mesh), experiment.seed

    def score(self, actor: Decoder) -> dict[str, Any]:
        """EM with a 95 % bootstrap interval, F1, searches, and `each`: a 0 or 1 for the EM of every question."""
        agent = Agent("greedy", "", "", actor)
        row = self._evaluator.score(agent, self._evaluator.run(agent))
        found = {"em": float(row.em.mean()), "em_interval": list(bootstrap_interval(row.em, seed=self._seed))}
        found["each"] = "".join(str(int(em)) for em in row.em)
        return {**found, "f1": float(row.f1.mean()), "searches": row.costs["searches"], "questions": len(row.em)}


def as_model(
    shop: Bench, kind: str, weights: Any, about: Mapping[str, Any], adapters: PeftAdapters | None = None
) -> Model:
    """The trained weights with what is needed to use them."""
    return Model(kind, shop.config, shop.tokenizer, weights, dict(about), adapters)
