"""Runs of several seeds pooled into one table."""

import json

import numpy as np
import pytest

from eval.pooled import Arguments, main, pooled_difference, read
from jraggym.errors import InputError


def run(folder, seed, **em):
    folder.mkdir()
    content = {"seed": seed, "em": em, "claims": [["a", "b", 0.25]]}
    (folder / "scores.json").write_text(json.dumps(content))
    return folder


def test_the_table_and_the_verdict(tmp_path, capsys):
    one = run(tmp_path / "one", 0, a=[1, 1, 1, 0], b=[0, 0, 1, 0])
    two = run(tmp_path / "two", 1, a=[1, 1, 1, 1], b=[0, 1, 0, 1])
    main(Arguments((one, two)))
    lines = capsys.readouterr().out.splitlines()
    assert "| a | 0.750 | 1.000 | 0.875 |" in lines
    assert lines[-1].startswith("| a - b >= +0.25 | +0.500 | +0.500 | +0.500 | +0.")
    assert lines[-1].endswith("| holds |")


def test_every_run_counts_alike_and_equal_scores_give_no_interval():
    many, few = np.ones(1000), np.zeros(10)
    assert pooled_difference([(many, many), (few, few)]) == (0.0, 0.0, 0.0)
    mean, low, high = pooled_difference([(many, 0 * many), (few, few)])
    assert (mean, low, high) == (0.5, 0.5, 0.5)


def test_the_interval_is_that_of_independent_runs():
    rng = np.random.default_rng(0)
    pairs = [(rng.integers(0, 2, 400).astype(float), np.zeros(400)) for _ in range(4)]
    mean, low, high = pooled_difference(pairs)
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / 1600**0.5, rel=0.1)
    assert low < mean < high


def test_bad_runs_are_refused(tmp_path):
    one, other = run(tmp_path / "one", 0, a=[1], b=[0]), run(tmp_path / "other", 1, a=[1], c=[0])
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "scores.json").write_text("{")
    for folders, message in (
        ((tmp_path / "nowhere",), "cannot read"),
        ((broken,), "cannot read"),
        ((), "nothing to pool"),
        ((one, other), "differ in rows"),
        ((one, one), "a seed comes twice"),
    ):
        with pytest.raises(InputError, match=message):
            read(folders)
