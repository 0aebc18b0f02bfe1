"""Answer metrics and bootstrap intervals.

Every answer metric is in [0, 1], takes the best value over the gold answers and gives 0.0 for the prediction None.

A gold such as "A" or "the" is empty once its articles are gone. Comparing the empty strings would let an empty
prediction score 1, so for such a gold every metric compares the raw strings instead, stripped and lower-cased;
an empty prediction never matches.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from jraggym.errors import InputError

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_CLOSED = frozenset({"yes", "no", "noanswer"})  # HotpotQA: these are right or wrong, never partly right
_SAME = {"true": "yes", "false": "no"}
_PREFIX = re.compile(r"\A(?:the\s+)?answer(?:\s+is\b\s*:?|\s*:)\s*", re.IGNORECASE)
# "(B) text", "B) text", "B. text", "B: text" or the letter alone; what follows is group 3
_LETTER = re.compile(r"(?:\(([A-Za-z])\)[.:]?|([A-Za-z])(?:[.):]|\Z))\s*(.*)", re.DOTALL)
_DRAWS_AT_ONCE = 1 << 22  # resampled values held in memory at a time (32 MiB of indices)


def normalize_answer(text: str) -> str:
    """Lower-cases, deletes ASCII punctuation and articles, and joins words by one space (SQuAD 1.1, HotpotQA)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str | None, golds: Sequence[str]) -> float:
    """1.0 when the normalised prediction equals a normalised gold (SQuAD 1.1); raises InputError without golds."""
    return _best(lambda ours, gold: float(ours == gold), prediction, golds)


def hotpot_f1(prediction: str | None, golds: Sequence[str]) -> float:
    """F1 of the multisets of normalised words; 0 when only one side is yes, no or noanswer (HotpotQA).

    Raises InputError without golds.
    """
    return _best(_word_f1, prediction, golds)


def true_false_f1(prediction: str | None, golds: Sequence[str]) -> float:
    """`hotpot_f1` that takes "true" for yes and "false" for no (R1-Searcher, UR2); raises InputError without golds."""
    return _best(lambda ours, gold: _word_f1(_SAME.get(ours, ours), _SAME.get(gold, gold)), prediction, golds)


def plain_f1(prediction: str | None, golds: Sequence[str]) -> float:
    """F1 of the multisets of normalised words, without a rule for yes and no (SQuAD 1.1; MMOA-RAG).

    Raises InputError without golds.
    """
    return _best(lambda ours, gold: _overlap(Counter(ours.split()), Counter(gold.split())), prediction, golds)


def set_f1(prediction: str | None, golds: Sequence[str]) -> float:
    """F1 of the sets of lower-cased words, articles and punctuation kept (DeepResearcher); repeating costs nothing.

    Raises InputError without golds.
    """

    def score(gold: str) -> float:
        ours, theirs = (Counter(set(text.lower().split())) for text in (prediction or "", gold))
        return _overlap(ours, theirs)

    _refuse_none(golds)
    return 0.0 if prediction is None else max(map(score, golds))


def cover_exact_match(prediction: str | None, golds: Sequence[str]) -> float:
    """1.0 when a normalised gold stands in the normalised prediction as whole words in a row.

    Raises InputError without golds.
    """
    return _best(lambda ours, gold: float(f" {gold} " in f" {ours} "), prediction, golds)


def multiple_choice(prediction: str | None, gold_letter: str, options: Mapping[str, str]) -> float:
    """1.0 when the prediction names exactly the option `gold_letter` of `options`, letter -> text.

    Accepted, after an optional "answer:" or "the answer is": the letter in either case ("B", "b", "(B)", "B."), the
    letter with its own option's text ("B. text", "(B) text"), or the text of exactly one option. A letter elsewhere in
    a sentence is not an answer, and neither is a letter with anything but its own text.
    Raises InputError when `gold_letter` is no option.
    """
    if gold_letter not in options:
        raise InputError(
            "the gold letter is no option", got=repr(gold_letter), remedy=f"Options: {', '.join(options)}."
        )
    if prediction is None:
        return 0.0
    text = _PREFIX.sub("", prediction.strip())
    if match := _LETTER.fullmatch(text):
        letter = (match[1] or match[2]).upper()
        if letter in options and (not match[3] or letter in _letters_of(match[3], options)):
            return float(letter == gold_letter)
    return float(_letters_of(text, options) == [gold_letter])


def bootstrap_interval(
    values: ArrayLike, *, seed: int, level: float = 0.95, samples: int = 2000
) -> tuple[float, float]:
    """Percentile bootstrap interval (low, high) of the mean of `values` [n], one per question (Efron 1979).

    Raises InputError when `values` is not a non-empty vector of finite numbers.
    """
    array = _vector(values)
    if not 0 < level < 1:
        raise InputError("the level must lie between 0 and 1", got=level, remedy="Use for example 0.95.")
    if samples < 1:
        raise InputError("the bootstrap needs samples", got=samples, remedy="Use for example 2000.")
    rng, rows = np.random.default_rng(seed), max(1, _DRAWS_AT_ONCE // array.size)
    sizes = [min(rows, samples - start) for start in range(0, samples, rows)]
    means = np.concatenate([array[rng.integers(array.size, size=(size, array.size))].mean(1) for size in sizes])
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired_bootstrap(
    a: ArrayLike, b: ArrayLike, *, seed: int, level: float = 0.95, samples: int = 2000
) -> tuple[float, float, float]:
    """(mean, low, high) of the difference a - b [n] of two systems on the same questions, by resampling questions.

    Raises InputError when `a` and `b` are not non-empty vectors of finite numbers of the same length.
    """
    first, second = _vector(a), _vector(b)
    if first.shape != second.shape:
        raise InputError(
            "a paired comparison needs the same questions on both sides",
            got=f"{first.size} and {second.size} values",
            remedy="Score both systems on every question; a failure counts 0.",
        )
    difference = first - second
    return float(difference.mean()), *bootstrap_interval(difference, seed=seed, level=level, samples=samples)


def _best(score: Callable[[str, str], float], prediction: str | None, golds: Sequence[str]) -> float:
    """The best `score` of the normalised prediction over the normalised golds."""
    _refuse_none(golds)
    if prediction is None:
        return 0.0
    ours = normalize_answer(prediction)
    return max(
        score(ours, theirs) if (theirs := normalize_answer(gold)) else _same_raw(prediction, gold) for gold in golds
    )


def _refuse_none(golds: Sequence[str]) -> None:
    if isinstance(golds, str) or not golds:
        raise InputError("gold answers must be a non-empty list", got=repr(golds), remedy="Give a tuple of texts.")


def _same_raw(prediction: str, gold: str) -> float:
    raw = prediction.strip().lower()
    return float(bool(raw) and raw == gold.strip().lower())


def _word_f1(ours: str, gold: str) -> float:
    if ours != gold and (ours in _CLOSED or gold in _CLOSED):
        return 0.0
    return _overlap(Counter(ours.split()), Counter(gold.split()))


def _overlap(ours: Counter[str], gold: Counter[str]) -> float:
    """2PR / (P + R) with P = common / |ours| and R = common / |gold|."""
    return 2 * (ours & gold).total() / max(ours.total() + gold.total(), 1)


def _letters_of(text: str, options: Mapping[str, str]) -> list[str]:
    """Letters of the options with this text: the raw text decides ("1.5 mg", "15 mg"), then the normalised one."""
    raw = [letter for letter, option in options.items() if _same_raw(text, option)]
    return raw or [letter for letter, option in options.items() if exact_match(text, (option,))]


def _vector(values: ArrayLike) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not array.size or not np.isfinite(array).all():
        raise InputError(
            "values must be a non-empty vector of finite numbers",
            got=f"shape {array.shape}",
            remedy="One per question.",
        )
    return array
