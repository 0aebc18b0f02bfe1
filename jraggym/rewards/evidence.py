"""Rewards of what the searches brought, whatever the answer."""

from __future__ import annotations

from jraggym.errors import InputError
from jraggym.metrics import cover_exact_match
from jraggym.rewards.finished import Finished


def gold_in_observations(finished: Finished) -> float:
    """1.0 where a gold answer stands, as whole words, in something that the model was shown (Search-R1)."""
    return max((cover_exact_match(text, finished.example.answers) for text in finished.observations), default=0.0)


def support_recall(finished: Finished) -> float:
    """The share of the gold documents that were found; with titles for ids, FrugalRAG's title recall.

    Raises InputError when the example names no gold document.
    """
    found, gold = _documents(finished)
    return len(found & gold) / len(gold)


def support_f1(finished: Finished) -> float:
    """F1 of the documents found against the gold documents, each counted once; raises as `support_recall`."""
    found, gold = _documents(finished)
    return 2 * len(found & gold) / (len(found) + len(gold))


def _documents(finished: Finished) -> tuple[set[str], set[str]]:
    if not finished.example.support:
        remedy = "Reward something else, or give examples with support."
        raise InputError("evidence needs gold documents", got=f"none in {finished.example.id!r}", remedy=remedy)
    return {d.id for search in finished.documents for d in search}, set(finished.example.support)
