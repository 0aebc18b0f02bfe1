"""The main job as a user runs it: a whole smoke run, again, killed and resumed, and refused on bad input."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from eval.report import check_results
from train.quickstart import main

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 600  # seconds; on two free cores a smoke run takes about one minute


def command(out, *more):
    return [sys.executable, "-m", "train.quickstart", "--smoke", "--out", str(out), *more]


def job(out, *more):
    """Runs the smoke job to its end."""
    return subprocess.run(command(out, *more), cwd=ROOT, capture_output=True, text=True, timeout=LIMIT)


def finished(out):
    """The results of a job that has to succeed."""
    process = job(out)
    assert process.returncode == 0, process.stderr[-3_000:]
    return json.loads((out / "results.json").read_text())


def snapshot(folder):
    """Every file below `folder` with its time and size."""
    stats = {path.relative_to(folder).as_posix(): path.stat() for path in folder.rglob("*") if path.is_file()}
    return {name: (stat.st_mtime_ns, stat.st_size) for name, stat in stats.items()}


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """(folder, results) of a job that nobody disturbed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    return out, finished(out)


def test_a_run_leaves_results_a_page_and_no_scratch(whole):
    out, results = whole
    check_results(results)
    names = [row["name"] for row in results["rows"]]
    assert {"closed book", "warm start, greedy", "DPO", "oracle"} <= set(names)
    asked = {row["name"]: row["questions"] for row in results["rows"]}
    assert 0 < asked.pop("DPO, permuted values") <= asked["DPO"], "comparisons cannot be permuted"
    assert len(set(asked.values())) == 1, asked
    page = (out / "report.html").read_text()
    assert [name for name in names if name.replace("+", "&#43;") not in page and name not in page] == []
    assert [name for name in snapshot(out) if name.endswith((".tmp", ".part"))] == []


def test_the_table_says_where_the_agents_stand(whole):
    _, results = whole
    em = {row["name"]: row["em"] for row in results["rows"]}
    assert em["oracle"] == max(em.values()) > 0.9, "the plans no longer solve their own questions"
    assert results["labels"]["states"] > 0
    assert results["labels"]["candidates"] > results["labels"]["states"]
    assert results["labels"]["sampled tokens"] > results["labels"]["candidates"]


def test_the_same_again_trains_nothing_and_says_the_same(whole):
    out, results = whole
    before = snapshot(out)
    again = finished(out)
    kept = ("checkpoints/", "data/", "eval/", "job.json")
    after = snapshot(out)
    assert {n: s for n, s in before.items() if n.startswith(kept)} == {
        n: s for n, s in after.items() if n.startswith(kept)
    }, "work that was finished was done again"
    assert again["rows"] == results["rows"]
    assert again["comparisons"] == results["comparisons"]
    assert again["seconds"] < 0.6 * results["seconds"]


def test_other_settings_in_the_same_folder_are_refused(whole):
    out, _ = whole
    before = snapshot(out)
    process = job(out, "--seed", "1")
    assert process.returncode == 2
    assert_one_line(process.stderr, str(out), "--out")
    assert snapshot(out) == before, "a refused job touched the folder"


def test_a_killed_run_ends_with_the_rows_of_an_undisturbed_one(whole, tmp_path):
    undisturbed, results = whole
    out = tmp_path / "run"
    # What no collected data changes need not be trained again.
    for made in ("compiled", "checkpoints/warm start", "checkpoints/warm start trained longer"):
        shutil.copytree(undisturbed / made, out / made)
    chunk = out / "data" / "warm-start" / "chunks" / "chunk-000000.jsonl"
    with subprocess.Popen(command(out), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + LIMIT
            while not chunk.exists() and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.05)
        finally:
            process.kill()
    assert process.returncode == -signal.SIGKILL, "the job ended before it could be killed"
    assert chunk.exists()
    assert not (out / "results.json").exists()
    first = chunk.stat().st_mtime_ns
    resumed = finished(out)
    assert chunk.stat().st_mtime_ns == first, "a finished chunk was collected again"
    for part in ("rows", "comparisons", "labels", "trajectories"):
        assert resumed[part] == results[part], f"{part} of the resumed run differ"


# ---------------------------------------------------------------- refused input: one line, exit code 2


def assert_one_line(text, *parts):
    lines = text.splitlines()
    assert len(lines) == 1, f"more than one line on stderr:\n{text}"
    assert lines[0].startswith("error: ")
    for part in parts:
        assert part in lines[0]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--dataset", "trivia"], ["unknown dataset", "'trivia'", "synthhop, hotpotqa"]),
        (["--dataset", "hotpotqa"], ["hotpotqa", "--data-dir"]),
    ],
    ids=["unknown dataset", "no data folder"],
)
def test_bad_arguments_are_named(arguments, parts, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    assert_one_line(refused(["--out", str(out), *arguments], monkeypatch, capsys), *parts)
    assert not out.exists()


def refused(arguments, monkeypatch, capsys):
    """What stands on stderr when the job is refused in this process."""
    monkeypatch.setattr(sys, "argv", ["train.quickstart", *arguments])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 2
    return capsys.readouterr().err


def test_an_out_below_a_file_is_refused(tmp_path, monkeypatch, capsys):
    file = tmp_path / "file"
    file.write_text("mine")
    assert_one_line(refused(["--out", str(file / "run")], monkeypatch, capsys), "cannot use", "--out")
    assert file.read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_unwritable_out_is_refused(tmp_path, monkeypatch, capsys):
    tmp_path.chmod(0o500)
    try:
        assert_one_line(refused(["--out", str(tmp_path / "run")], monkeypatch, capsys), "cannot use", "--out")
    finally:
        tmp_path.chmod(0o700)


def test_a_damaged_job_file_is_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "job.json").write_text("{")
    assert_one_line(refused(["--out", str(tmp_path)], monkeypatch, capsys), "cannot use", "--out")
    assert (tmp_path / "job.json").read_text() == "{"


def test_a_missing_data_folder_is_named(tmp_path):
    missing = tmp_path / "nowhere"
    process = job(tmp_path / "run", "--dataset", "hotpotqa", "--data-dir", str(missing))
    assert process.returncode == 2
    assert_one_line(process.stderr, "HotpotQA folder", str(missing))
