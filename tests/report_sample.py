"""Results of a realistic size for the tests of the report, made from a fixed seed."""

from __future__ import annotations

import math
import random

KINDS = ("one hop", "two hop", "three hop", "comparison")
ROWS = (
    ("No retrieval", "floor", "the actor answers from its weights", 0.08),
    ("Always the first paragraph", "floor", "", 0.14),
    ("Direct RAG", "baseline", "one search with the question itself", 0.31),
    ("IRCoT", "baseline", "a fixed number of searches", 0.39),
    ("SFT warm start", "baseline", "cloned from oracle episodes", 0.52),
    ("DPO", "trained", "on pairs of candidates, from the warm start", 0.61),
    ("GRPO", "trained", "process rewards as group advantages", 0.63),
    ("PPO", "trained", "with a learned value", 0.58),
    ("Warm start + critic", "trained", "best of 8 by the critic", 0.66),
    ("DPO + critic", "trained", "best of 8 by the critic", 0.714),
    ("DPO on shuffled rewards", "control", "labels permuted inside each state", 0.5),
    ("Random of 8", "control", "best of 8 by a coin", 0.515),
    ("Oracle critic", "ceiling", "best of 8 by the hidden label", 0.842),
    ("Gold documents", "ceiling", "the supporting paragraphs are given", 0.963),
)
CURVES = (
    ("SFT warm start", ("loss", "token_accuracy"), 300),
    ("Critic", ("loss", "pair_accuracy", "margin"), 120),
    ("DPO", ("loss", "reward_accuracy", "kl"), 200),
    ("GRPO", ("reward", "kl"), 160),
    ("PPO", ("reward", "value_loss", "kl"), 160),
    ("Validation", ("exact_match",), 12),
)


def sample(trajectories: int = 60, candidates: int = 8) -> dict:
    """Results of a realistic size: 14 rows, 6 curves."""
    dice = random.Random(0)
    return {
        "title": "Search agents trained on process rewards",
        "dataset": "SynthHop",
        "seed": 0,
        "seconds": 531.4,
        "created": "2025-01-31 12:00 UTC",
        "versions": {"python": "3.11.9", "jax": "0.10.2", "flax": "0.12.8", "optax": "0.2.6"},
        "config": {"model": {"layers": 2, "width": 128}, "learning_rate": 3e-4, "candidates": candidates},
        "stages": [
            {"name": name, "seconds": seconds, "detail": detail}
            for name, seconds, detail in (
                ("World", 3.1, "2,400 documents"),
                ("Index", 1.4, "BM25 and dense"),
                ("SFT warm start", 141.0, "300 steps"),
                ("Label", 96.2, "512 states, 8 candidates each"),
                ("Critic", 41.0, "120 steps"),
                ("DPO", 60.8, "200 steps"),
                ("GRPO", 70.7, "160 steps"),
                ("PPO", 71.2, "160 steps"),
                ("Evaluate", 45.9, "14 agents, 400 questions"),
            )
        ],
        "rows": [_row(dice, *row) for row in ROWS],
        "comparisons": [
            _comparison(
                "DPO + critic vs SFT", "Training the actor and choosing by the critic helps", 0.194, 0.03, True
            ),
            _comparison("DPO vs warm start", "Process preferences help the actor alone", 0.09, 0.04, True),
            _comparison("Critic vs coin", "The critic chooses better than chance", 0.145, 0.04, True),
            _comparison("GRPO vs PPO", "Group advantages beat a learned value", 0.05, 0.06, False),
            _comparison("Shuffled vs warm start", "Shuffled rewards do not help", -0.02, 0.035, True),
        ],
        "curves": [
            {"name": name, "x": "step", "metrics": {metric: _curve(dice, metric, steps) for metric in metrics}}
            for name, metrics, steps in CURVES
        ],
        "world": {"documents": 2400, "questions": {"train": 4000, "validation": 400, "test": 400}, "held_out": True},
        "labels": {
            "states": 512,
            "candidates": 4096,
            "pairs": 5812,
            "mean_reward": 0.4127,
            "rank_reward": [[index / 7, 300 + 70 * index - 8 * index * index] for index in range(8)],
        },
        "trajectories": [_trajectory(dice, index, candidates) for index in range(trajectories)],
    }


def _row(dice: random.Random, name: str, group: str, note: str, em: float) -> dict:
    low, high = max(0.0, em - 0.045), min(1.0, em + 0.045)
    return {
        **{"name": name, "group": group, "note": note, "questions": 400, "em": em, "em_interval": [low, high]},
        **{"f1": em * 0.9 + 0.1, "f1_interval": [low * 0.9 + 0.1, high * 0.9 + 0.1], "failed": 0},
        **{"searches": 2.0 + em, "calls": 3.1, "tokens": 1234.5, "malformed": 0.012},
        "by_kind": {
            kind: {"questions": 100, "em": min(1.0, max(0.0, em + 0.15 - 0.1 * index + dice.uniform(-0.05, 0.05)))}
            for index, kind in enumerate(KINDS)
        },
    }


def _comparison(name: str, claim: str, difference: float, half: float, holds: bool) -> dict:
    interval = [difference - half, difference + half]
    return {"name": name, "claim": claim, "difference": difference, "interval": interval, "holds": holds}


def _curve(dice: random.Random, metric: str, steps: int) -> list[list[float]]:
    falls = "loss" in metric
    noise = 0.1 if steps > 20 else 0.01
    return [
        [
            step,
            (2.5 * math.exp(-step / 60) + 0.3 if falls else 0.75 - 0.6 * math.exp(-step / 50)) + dice.gauss(0, noise),
        ]
        for step in range(1, steps + 1)
    ]


def _trajectory(dice: random.Random, index: int, count: int) -> dict:
    correct = dice.random() < 0.6
    people = [f"{first} {last}" for first in ("Ada", "Brum", "Cleo", "Dov") for last in ("Marsh", "Quill", "Ostrander")]
    steps = []
    for number in range(dice.randint(1, 4)):
        texts = [f"<search>Where was {dice.choice(people)} born</search>" for _ in range(count - 2)]
        texts += ["<answer>Port Velia</answer>", "<think>I know the place.</think><search>mayor of Port Velia</search>"]
        scores = sorted((dice.gauss(0, 1.4) for _ in texts), reverse=True)
        steps.append(
            {
                "candidates": [
                    {
                        "text": text,
                        "reward": dice.random(),
                        "score": scores[at],
                        "logprob": -4 * dice.random(),
                        "chosen": at == 0,
                    }
                    for at, text in enumerate(texts)
                ],
                "documents": [
                    {"title": name, "text": f"{name} was born in Port Velia and later became a lighthouse keeper. " * 4}
                    for name in dice.sample(people, 3)
                ],
                "error": "the retriever timed out" if index == 3 and number == 0 else None,
            }
        )
    return {
        **{"row": ROWS[index % len(ROWS)][0], "example_id": f"test-{index // 3}", "kind": KINDS[index % len(KINDS)]},
        "question": f"Who governs the town in which {people[index % len(people)]} was born (question {index})?",
        **{
            "golds": ["Ada Marsh"],
            "answer": "Ada Marsh" if correct else None,
            "em": float(correct),
            "f1": float(correct),
        },
        "steps": steps,
    }
