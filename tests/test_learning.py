"""Learning curves over seeds: areas, verdicts, the page, and runs that cannot be compared."""

import json

import numpy as np
import pytest

from eval.learning import Arguments, Run, by_kind, main, read, verdicts
from jraggym.errors import InputError

FAST, SLOW = "GRPO, process rewards", "GRPO, outcome rewards"


def write_run(folder, kind, seed, points, questions=200):
    """A run whose EM at (tokens, share) has the first share of the questions right."""
    folder.mkdir()
    curve = [
        {"iteration": i, "sampled_tokens": tokens, "each": ("1" * round(share * questions)).ljust(questions, "0")}
        for i, (tokens, share) in enumerate(points)
    ]
    (folder / "results.json").write_text(json.dumps({"experiment": kind, "seed": seed, "curve": curve}))
    return folder


@pytest.fixture
def runs(tmp_path):
    fast = [write_run(tmp_path / f"fast{s}", FAST, s, [(0, 0.4), (100, 0.6), (200, 0.6)]) for s in range(2)]
    slow = [write_run(tmp_path / f"slow{s}", SLOW, s, [(0, 0.4), (300, 0.46)]) for s in range(2)]
    return *fast, *slow


def test_the_mean_is_over_the_tokens_and_not_over_the_points():
    run = Run(FAST, 0, np.array([0.0, 10.0, 100.0]), np.array([[0.0], [1.0], [1.0]]))
    assert run.mean_until(100)[0] == pytest.approx((0.5 * 10 + 90) / 100, abs=0.01)
    assert run.mean_until(10)[0] == pytest.approx(0.5, abs=0.01)


def test_verdicts_are_paired_by_seed_and_end_at_the_shortest_run(runs):
    found = {claim: (each, mean, holds) for claim, each, mean, holds in verdicts(by_kind([read(r) for r in runs]))}
    assert len(found) == 3
    assert found[f"{FAST}: end - start >= +0.10"][0] == pytest.approx([0.2, 0.2])
    assert found[f"{FAST}: end - start >= +0.10"][2]
    assert not found[f"{SLOW}: end - start >= +0.10"][2], "a rise of .06 is less than asked for"
    each, (mean, low, high), holds = found[f"{FAST}: mean EM until 200 tokens - the same with outcome rewards > 0"]
    wanted = (0.5 + 0.6) / 2 - (0.4 + 0.44) / 2
    assert each == pytest.approx([wanted, wanted], abs=0.005)
    assert low < mean < high
    assert holds


def test_tables_and_page(runs, tmp_path, capsys):
    main(Arguments(runs, tmp_path / "page.html"))
    told = capsys.readouterr().out
    assert "| GRPO, process rewards | 1 | 200 | 0.400 | 0.600 |" in told
    assert told.count("does not hold") == 1
    page = (tmp_path / "page.html").read_text()
    assert page.count("<svg") == 1
    assert "GRPO, outcome rewards: end - start &gt;= +0.10" in page


@pytest.mark.parametrize("damage", [None, "{", '{"experiment": "x", "seed": 0, "curve": [{"sampled_tokens": 1}]}'])
def test_what_is_no_run_is_refused_by_name(tmp_path, damage):
    if damage is not None:
        (tmp_path / "results.json").write_text(damage)
    with pytest.raises(InputError, match=r"cannot read .*results\.json.*Name the --out folder"):
        read(tmp_path)


def test_a_run_twice_or_with_one_point_is_refused(runs, tmp_path):
    with pytest.raises(InputError, match="has a seed twice; got"):
        by_kind([read(runs[0]), read(runs[0])])
    with pytest.raises(InputError, match="no curve in"):
        read(write_run(tmp_path / "short", FAST, 0, [(0, 0.4)]))
