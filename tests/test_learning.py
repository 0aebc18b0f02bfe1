"""Learning curves over seeds: areas, verdicts, the page, and runs that cannot be compared."""

import json

import numpy as np
import pytest

from eval.learning import Arguments, Episodes, Run, beside, by_kind, main, read, read_main_job, verdicts
from jraggym.errors import InputError

FAST, SLOW = "GRPO, process rewards", "GRPO, outcome rewards"


def write_run(folder, kind, seed, points, questions=200, **more):
    """A run whose EM at (tokens, share) has the first share of the questions right."""
    folder.mkdir()
    curve = [
        {"iteration": i, "sampled_tokens": tokens, "each": ("1" * round(share * questions)).ljust(questions, "0")}
        for i, (tokens, share) in enumerate(points)
    ]
    if more:
        curve[0]["searches_by_need"], curve[-1]["searches_by_need"] = {"1": 1.0, "2": 1.26}, {"1": 1.1, "2": 2.0}
    (folder / "results.json").write_text(json.dumps({"experiment": kind, "seed": seed, "curve": curve, **more}))
    return folder


def write_main_job(folder, seed, tokens, right, questions=200):
    """A main job whose DPO + critic has the first `right` questions right."""
    folder.mkdir()
    em = {"DPO": [0.0] * questions, "DPO + critic best of 8": [float(i < right) for i in range(questions)]}
    (folder / "scores.json").write_text(json.dumps({"seed": seed, "em": em, "claims": []}))
    (folder / "results.json").write_text(json.dumps({"labels": {"sampled tokens": tokens}}))
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


def test_whole_episodes_are_set_against_their_oracle_and_main_jobs(tmp_path, capsys):
    more = {"oracle": 0.8, "broken_retriever": {"em": 0.15}}
    runs = [write_run(tmp_path / f"r{s}", "research", s, [(0, 0.4), (100, 0.6), (200, 0.7)], **more) for s in range(2)]
    kinds = by_kind([read(run) for run in runs])
    found = {claim: (each, holds) for claim, each, _, holds in verdicts(kinds)}
    each, holds = found["research: end - half of the way from start to oracle >= 0"]
    assert each == pytest.approx([0.1, 0.1])  # .7, and half of the way from .4 to .8
    assert holds
    jobs = [write_main_job(tmp_path / f"q{s}", s, 150 + 900 * s, 100 + s) for s in range(2)]
    ((claim, each, _, _),) = beside(kinds, [read_main_job(job) for job in jobs])
    assert claim == "research: after 150, 1,050 tokens - DPO + critic best of 8 > 0"
    assert each == pytest.approx([0.65 - 0.5, 0.7 - 0.505]), "after more tokens than the run has, its end"
    main(Arguments(tuple(runs), beside=tuple(jobs)))
    told = capsys.readouterr().out
    assert "| research | 1 | 0.800 | 0.150 | 1: 1.0, 2: 1.3 | 1: 1.1, 2: 2.0 |" in told
    assert "| DPO + critic best of 8 | 0 | 150 | | 0.500 |" in told
    with pytest.raises(InputError, match="research has no main job beside it"):
        beside(kinds, [read_main_job(jobs[0])])
    with pytest.raises(InputError, match=r"finished train.quickstart run"):
        read_main_job(runs[0])
    again = [*jobs, write_main_job(tmp_path / "again", 1, 10, 5)]
    with pytest.raises(InputError, match="do not belong together"):
        beside(kinds, [read_main_job(job) for job in again])
    other = [write_main_job(tmp_path / f"short{s}", s, 10, 5, questions=20) for s in range(2)]
    with pytest.raises(InputError, match="were asked other questions"):
        beside(kinds, [read_main_job(job) for job in other])


def test_a_recipe_is_set_against_its_controls(tmp_path):
    ends = {"research": 0.7, "research, no mask": 0.6, "research, broken retriever": 0.1, "researcher, no mask": 0.2}
    runs = [
        write_run(tmp_path / f"{name} {s}", name, s, [(0, 0.4), (200, end)])
        for name, end in ends.items()
        for s in ((1,) if "broken" in name else (0, 1))
    ]
    found = {
        claim: each for claim, each, _, _ in verdicts(by_kind([read(run) for run in runs])) if "start" not in claim
    }
    assert found.keys() == {"research: end - no mask > 0", "research: end - broken retriever > 0"}
    assert found["research: end - no mask > 0"] == pytest.approx([0.1, 0.1])
    assert found["research: end - broken retriever > 0"] == pytest.approx([0.6]), "seed 1 alone has both"


def test_half_of_the_way_varies_with_the_start_as_much_as_it_counts():
    """end - (start + oracle) / 2 is 0 for every question here, so that drawing other questions changes nothing."""
    start = np.array([0.0, 1.0] * 100)
    episodes = Episodes(1.0, 0.1, {"1": 1.0}, {"1": 1.0})
    run = Run("research", 0, np.array([0.0, 10.0]), np.stack([start, 0.5 + start / 2]), episodes)
    ((_, _, interval, _),) = [v for v in verdicts({"research": [run]}) if "half of the way" in v[0]]
    assert interval == pytest.approx((0.0, 0.0, 0.0))


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
