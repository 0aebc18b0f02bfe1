"""How good a critic is on labelled states: pairs, calibration, and what the best of N by its scores is worth."""

from __future__ import annotations

import functools
import operator
from collections import defaultdict
from collections.abc import Callable, Sequence
from math import comb
from typing import Any

import jax
import numpy as np

from jraggym.chats.local import width
from jraggym.data.process import ProcessRecord
from jraggym.errors import InputError
from jraggym.model_folder import Model
from jraggym.objectives.agreement import Agreement, agreement
from jraggym.objectives.forward import candidate_scores
from jraggym.objectives.pairs import POSITIVE
from jraggym.recipes.bench import record_row
from jraggym.text.batching import EMPTY_ROW, Codec, Row, collate
from jraggym.text.chat import ChatCodec
from jraggym.text.huggingface import HuggingFaceTokenizer

SAMPLES = 2_000  # bootstrap samples
Scored = tuple[list[np.ndarray], Agreement]  # scores [K] of each record, and the counts over all


@functools.partial(jax.jit, static_argnums=1)
def _count(weights: Any, config: Any, batch: Any) -> tuple[jax.Array, Agreement]:
    scores = candidate_scores(weights, config, batch)
    return scores, agreement(scores, batch)


def score_records(
    model: Model,
    records: Sequence[ProcessRecord],
    max_turns: int,
    max_prompt: int,
    *,
    rows: int = 16,
    report: Callable[[int], None] | None = None,
) -> Scored:
    """The critic's scores of every candidate, and its agreement with the labels.

    `max_turns` and `max_prompt` are those that the critic was trained with. Raises InputError without records, for a
    model that is no critic, and where a chat does not fit `max_prompt`.
    """
    if model.kind != "critic" or not records:
        got = f"a model of kind {model.kind} and {len(records)} states"
        raise InputError("scores need a critic and labelled states", got=got, remedy="Name both.")
    kind = ChatCodec if isinstance(model.tokenizer, HuggingFaceTokenizer) else Codec
    codec = kind(model.tokenizer, max_turns, max_prompt)  # type: ignore[arg-type]
    groups: dict[tuple[int, int, int], list[tuple[int, Row]]] = defaultdict(list)
    for place, record in enumerate(records):
        texts, rewards = [c.text for c in record.candidates], [c.reward for c in record.candidates]
        row = record_row(codec, record, texts, rewards)
        prompt, action = row.sizes
        groups[width(prompt, 64), width(action, 16), len(row.actions)].append((place, row))
    found: list[np.ndarray] = [np.empty(0)] * len(records)
    parts, done = [], 0
    for (prompt, action, k), members in groups.items():
        for start in range(0, len(members), rows):
            part = members[start : start + rows]
            padded = [row for _, row in part] + [EMPTY_ROW] * (rows - len(part))
            scores, counts = _count(
                model.weights, model.config, collate(padded, prompt=prompt, action=action, candidates=k)
            )
            parts.append(_widened(jax.device_get(counts), max(key[2] for key in groups)))
            for (place, row), line in zip(part, np.asarray(scores), strict=False):
                found[place] = line[: len(row.actions)]
            done += len(part)
            if report is not None:
                report(done)
    return found, functools.reduce(operator.add, parts)


def _widened(counts: Agreement, k: int) -> Agreement:
    """The counts by rank distance as [k], so that those of states with fewer candidates add up."""
    pairs, right = (np.pad(np.asarray(x), (0, k - len(x))) for x in (counts.pairs, counts.right))
    return counts.replace(pairs=pairs, right=right)  # type: ignore[attr-defined]


def examine(records: Sequence[ProcessRecord], scored: Scored, seed: int = 0) -> dict[str, Any]:
    """Pair accuracy with its 95 % interval (by questions), calibration with its table, and the best-of-N curve.

    Raises InputError when no two candidates of a state have different rewards.
    """
    scores, counts = scored
    if not float(np.sum(counts.pairs)):
        raise InputError("no state tells its candidates apart", got=f"{len(records)} states", remedy="Label them.")
    questions: dict[str, list[int]] = defaultdict(list)
    for place, record in enumerate(records):
        questions[record.example_id].append(place)
    groups = list(questions.values())
    pairs = np.array([_pairs(record, line) for record, line in zip(records, scores, strict=True)])
    low, high = _interval(groups, pairs[:, 1], pairs[:, 0], seed)
    return {
        "states": len(records),
        "questions": len(groups),
        **counts.summary(),
        "accuracy_interval": [low, high],
        "reliability": counts.reliability(),
        "best_of": best_of_curve(records, scores, groups, seed),
    }


def _pairs(record: ProcessRecord, scores: np.ndarray) -> tuple[float, float]:
    """Pairs of distinct candidates with different rewards, and those that the scores order alike (ties one half)."""
    distinct = {c.text: (c.reward, s) for c, s in reversed(list(zip(record.candidates, scores, strict=True)))}
    known = [(reward, score) for reward, score in distinct.values() if reward is not None]
    better = [float(np.sign(s - t) + 1) / 2 for r, s in known for q, t in known if r > q]
    return len(better), sum(better)


def best_of(scores: np.ndarray, values: np.ndarray, n: int) -> float:
    """The expected value of the candidate of the highest score among n of the K, drawn without replacement.

    Exact: the r-th best of K is the best of n drawn ones with probability C(K - r, n - 1) / C(K, n). Equal scores
    share their values.
    """
    k = len(scores)
    levels = [(score, values[scores == score].mean()) for score in np.sort(scores)[::-1]]
    chances = [comb(k - 1 - place, n - 1) / comb(k, n) for place in range(k)]
    return float(sum(chance * value for chance, (_, value) in zip(chances, levels, strict=True)))


def sizes(k: int) -> list[int]:
    """1, 2, 4 ... and k."""
    return [*(1 << i for i in range(k.bit_length()) if 1 << i < k), k]


def best_of_curve(
    records: Sequence[ProcessRecord], scores: Sequence[np.ndarray], groups: Sequence[Sequence[int]], seed: int = 0
) -> list[dict[str, Any]]:
    """For N = 1, 2, 4 ... K: what is picked by the critic's scores, and by the labels themselves.

    {"n", "states", "critic": {"reward", "interval", "good"}, "oracle": {"reward", "good"}}: mean process rewards and
    shares of good candidates (reward > 0.75). At N = 1 all is chance. States with an unlabelled candidate, or with
    fewer candidates than others, are left out.
    """
    k = max(len(line) for line in scores)
    whole = [
        place
        for place, record in enumerate(records)
        if len(record.candidates) == k and all(c.reward is not None for c in record.candidates)
    ]
    usable = set(whole)
    kept = [members for group in groups if (members := [place for place in group if place in usable])]
    curve = []
    for n in sizes(k):
        sums: dict[str, np.ndarray] = {name: np.zeros(len(records)) for name in ("c", "cg", "o", "og")}
        for place in whole:
            rewards = np.array([c.reward for c in records[place].candidates], float)
            good = (rewards > POSITIVE).astype(float)
            for name, by, values in (
                *(("c", scores[place], rewards), ("cg", scores[place], good)),
                *(("o", rewards, rewards), ("og", rewards, good)),
            ):
                sums[name][place] = best_of(by, values, n)
        means = {name: float(values[whole].mean()) if whole else 0.0 for name, values in sums.items()}
        low, high = _interval(kept, sums["c"], np.ones(len(records)), seed) if kept else (0.0, 0.0)
        critic = {"reward": means["c"], "interval": [low, high], "good": means["cg"]}
        curve.append(
            {"n": n, "states": len(whole), "critic": critic, "oracle": {"reward": means["o"], "good": means["og"]}}
        )
    return curve


def _interval(groups: Sequence[Sequence[int]], top: np.ndarray, bottom: np.ndarray, seed: int) -> tuple[float, float]:
    """95 % interval of sum(top) / sum(bottom), by resampling groups of places."""
    sums = np.array([[top[list(group)].sum(), bottom[list(group)].sum()] for group in groups])
    drawn = sums[np.random.default_rng(seed).integers(0, len(sums), (SAMPLES, len(sums)))].sum(axis=1)
    shares = drawn[drawn[:, 1] > 0, 0] / drawn[drawn[:, 1] > 0, 1]
    low, high = np.quantile(shares, [0.025, 0.975])
    return float(low), float(high)
