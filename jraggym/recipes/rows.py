"""The rows of the main job's table: every agent and every control on the same test questions."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jax.sharding import Mesh

from jraggym.data.plan import oracle
from jraggym.episodes import Retriever, Rules
from jraggym.evaluation import Row, score
from jraggym.models.critic import Critic
from jraggym.models.decoder import Decoder
from jraggym.recipes.quickstart import Workshop
from jraggym.recipes.task import Split
from jraggym.retrieval.hybrid import BrokenRetriever, HybridRetriever
from jraggym.rollout import Policy, Rollout
from jraggym.sampling import Sampling
from jraggym.scripted import run_script
from jraggym.sharding import split_over
from jraggym.types import Trajectory


@dataclass(frozen=True)
class Agent:
    """One row: who acts, how its actions are drawn, and by which rule one of them is executed."""

    name: str
    group: str
    note: str
    actor: Decoder
    critic: Critic | None = None
    select: str = "first"
    draw: str = "greedy"  # or "one sample", or "K samples"
    max_turns: int | None = None
    retriever: Retriever | None = None
    split: Split | None = None  # other questions than the test split's


@dataclass(frozen=True)
class Models:
    """What the stages trained."""

    warm: Decoder
    warm_longer: Decoder
    imitation: Decoder
    dpo: Decoder
    dpo_shuffled: Decoder
    critic: Critic
    critic_shuffled: Critic


def agents(shop: Workshop, models: Models) -> list[Agent]:
    """The table, from floor to control."""
    n, many = shop.settings.candidates, "K samples"
    broken = BrokenRetriever(shop.test_retriever, shop.settings.seed)
    table = [
        Agent("closed book", "floor", "the warm start answers at once, without any search", models.warm, max_turns=1),
        Agent("warm start, greedy", "baseline", "SFT on imperfect demonstrations", models.warm),
        Agent("warm start, sampled", "baseline", "one sample instead", models.warm, draw="one sample"),
        Agent(f"warm start, majority of {n}", "baseline", "most frequent action", models.warm, None, "majority", many),
        Agent("SFT on good actions", "trained", "imitates the positively labelled candidates", models.imitation),
        Agent("DPO", "trained", "positive against negative candidates of a state", models.dpo),
        Agent(
            f"warm start + critic best of {n}",
            "trained",
            "the critic picks each action",
            models.warm,
            models.critic,
            "score",
            many,
        ),
        Agent(f"DPO + critic best of {n}", "trained", "Re2Search++'s shape", models.dpo, models.critic, "score", many),
        Agent(f"DPO, majority of {n}", "baseline", "most frequent action", models.dpo, None, "majority", many),
        Agent(
            "warm start trained longer",
            "control",
            "as many more steps on demonstrations as DPO has",
            models.warm_longer,
        ),
        Agent("DPO, shuffled rewards", "control", "rewards dealt at random", models.dpo_shuffled),
        Agent(
            f"warm start + shuffled critic best of {n}",
            "control",
            "the critic's data and steps, rewards dealt at random",
            models.warm,
            models.critic_shuffled,
            "score",
            many,
        ),
        Agent(f"warm start + random best of {n}", "control", "a random score picks", models.warm, None, "random", many),
        Agent("DPO, broken retriever", "control", "searches bring random documents", models.dpo, retriever=broken),
    ]
    if (dealt := shop.task.permuted) is not None:
        note = "chains of relations in a world of the same names with all values dealt anew"
        over = HybridRetriever(dealt.corpus, shop.test_retriever.encoder, k=shop.settings.documents)
        table.append(Agent("DPO, permuted values", "control", note, models.dpo, retriever=over, split=dealt))
    return table


class Evaluator:
    """Runs agents on one split; a compiled program for each way to draw, and one with a critic, serve all rows."""

    def __init__(self, shop: Workshop, split: Split, retriever: HybridRetriever, mesh: Mesh | None = None):
        settings = shop.settings
        self._shop, self._split, self._retriever = shop, split, retriever
        self._rules = Rules(settings.max_turns, seed=settings.seed)
        draws = {
            "greedy": Sampling(1, settings.max_action, 0.0),
            "one sample": Sampling(1, settings.max_action, settings.test_temperature),
            "K samples": Sampling(settings.candidates, settings.max_action, settings.test_temperature),
        }
        slots = split_over(mesh, settings.episodes)
        self._rollouts = {
            name: Rollout(shop.config, shop.codec, retriever, how, self._rules, batch=slots, mesh=mesh)
            for name, how in draws.items()
        }

    def run(self, agent: Agent, report: Callable[[int], None] | None = None) -> list[Trajectory]:
        """The agent's episodes on all questions, in order."""
        turns = agent.max_turns or self._rules.max_turns
        rules = dataclasses.replace(self._rules, select=agent.select, max_turns=turns)
        rollout = self._rollouts[agent.draw]
        policy = Policy(self._shop.config, agent.actor, agent.critic)
        examples, key = (agent.split or self._split).examples, self._shop.key("test")
        return rollout.run(policy, examples, key, rules=rules, retriever=agent.retriever, report=report)

    def oracle(self) -> Row:
        """The ceiling: the plan's searches with the real retriever, and the gold answer if all was found."""
        examples, plans = self._split.examples, self._split.plans
        budgets = [self._rules.max_turns] * len(examples)
        found = run_script(
            examples, lambda i, state: oracle(examples[i], plans[examples[i].id], state), self._retriever, budgets
        )
        note = "the plan's searches, then the gold answer if its documents were found"
        return score("oracle", "ceiling", note, examples, found, self._count)

    def score(self, agent: Agent, trajectories: Sequence[Trajectory]) -> Row:
        """The agent's row of the table."""
        examples = (agent.split or self._split).examples
        return score(agent.name, agent.group, agent.note, examples, trajectories, self._count)

    def _count(self, texts: Sequence[str]) -> int:
        return sum(map(len, self._shop.tokenizer.encode(texts)))


def sample_for_report(
    split: Split, runs: Mapping[str, Sequence[Trajectory]], rows: Mapping[str, Row], number: int, seed: int
) -> list[dict[str, Any]]:
    """Trajectories for the report: the same questions, drawn at random, for each of the given runs."""
    chosen = sorted(random.Random(seed).sample(range(len(split.examples)), min(number, len(split.examples))))
    return [_page(name, split, run[i], rows[name], i) for name, run in runs.items() for i in chosen]


def _page(name: str, split: Split, trajectory: Trajectory, row: Row, i: int) -> dict[str, Any]:
    example, turns = split.examples[i], trajectory.final.turns
    steps = []
    for number, step in enumerate(trajectory.steps):
        turn = turns[number] if number < len(turns) else None
        steps.append(
            {
                "candidates": [
                    {
                        "text": c.text,
                        "reward": c.reward,
                        "score": c.score,
                        "logprob": c.logprob,
                        "chosen": place == step.chosen,
                    }
                    for place, c in enumerate(step.candidates)
                ],
                "documents": [{"title": d.title, "text": d.text} for d in turn.documents] if turn else [],
                "error": turn.error if turn else None,
            }
        )
    return {
        "row": name,
        "example_id": example.id,
        "kind": example.kind,
        "question": example.question,
        "golds": list(example.answers),
        "answer": trajectory.final.answer,
        "em": float(row.em[i]),
        "f1": float(row.f1[i]),
        "steps": steps,
    }
