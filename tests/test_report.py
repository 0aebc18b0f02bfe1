"""The report: complete, escaped, self-contained, deterministic, and strict about its input."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from report_sample import sample

from eval.report import check_results, read_results, render_report, write_report
from eval.report_view import scale_over
from jraggym.errors import InputError

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'{{ 7*7 }}"


class _Page(HTMLParser):
    """The visible text, the tags and every attribute of a page."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.texts: list[str] = []
        self.feed(html)
        self.text = " ".join(self.texts)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def _found(pattern: str, html: str) -> str:
    match = re.search(pattern, html, re.DOTALL)
    assert match, f"nothing in the page looks like {pattern}"
    return match[1]


@pytest.fixture(scope="module")
def html() -> str:
    return render_report(sample())


def test_page_reaches_for_nothing_outside_itself(html: str) -> None:
    page = _Page(html)
    links = [value for name, value in page.attributes if name in ("src", "href", "srcset", "action", "data", "poster")]
    assert all(link.startswith("#") or link == "data:," for link in links), links
    assert not re.search(r"https?://|@import|url\(", html), "the page names something outside itself"
    assert "default-src 'none'" in html, "the page's policy does not forbid the network"


def test_every_link_inside_the_page_has_its_target(html: str) -> None:
    attributes = _Page(html).attributes
    ids = [value for name, value in attributes if name == "id"]
    targets = {value[1:] for name, value in attributes if name == "href" and value.startswith("#")}
    assert len(ids) == len(set(ids)), "an id is used twice"
    assert targets <= set(ids), targets - set(ids)


def test_every_row_claim_curve_and_trajectory_is_shown(html: str) -> None:
    page, results = _Page(html), sample()
    shown = [row["name"] for row in results["rows"]] + [item["claim"] for item in results["comparisons"]]
    shown += [item["name"] for item in results["curves"]] + [item["name"] for item in results["stages"]]
    shown += [trajectory["question"] for trajectory in results["trajectories"]]
    shown += [
        document["text"] for item in results["trajectories"] for step in item["steps"] for document in step["documents"]
    ]
    assert not [text for text in shown if text not in page.texts]
    assert page.tags.count("article") == 60
    assert page.text.count("the retriever timed out") == 1


def test_headline_compares_the_best_trained_row_with_the_warm_start(html: str) -> None:
    heading = re.sub(r"<[^>]*>", "", _found(r"<h1>(.*?)</h1>", html))
    assert " ".join(heading.split()) == (
        "DPO + critic answers 71.4% of the questions exactly, 19.4 points above SFT warm start."
    )


def test_marks_do_not_rest_on_colour_alone(html: str) -> None:
    texts = _Page(html).texts
    assert texts.count("✓ holds") == 4
    assert texts.count("✗ does not hold") == 1


def test_page_of_sixty_trajectories_stays_below_three_megabytes(html: str) -> None:
    assert len(html.encode()) < 3_000_000


def test_the_same_results_give_the_same_bytes(tmp_path: Path) -> None:
    for name, results in (("a", sample()), ("b", json.loads(json.dumps(sample())))):
        write_report(results, tmp_path / name / "report.html")
    assert (tmp_path / "a" / "report.html").read_bytes() == (tmp_path / "b" / "report.html").read_bytes()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["report.html"], "a temporary file was left"


def _hostile(value: Any, names: dict[str, str]) -> Any:
    """`value` with every text, and every free key, made hostile and unique."""
    if isinstance(value, str):
        return names.setdefault(value, f"{len(names)}{HOSTILE}")
    if isinstance(value, list):
        return [_hostile(item, names) for item in value]
    if isinstance(value, dict):
        return {key: _hostile(item, names) for key, item in value.items()}
    return value


def _hostile_sample() -> dict:
    clean = sample(4, 3)
    results = _hostile(clean, {})
    free = f"key{HOSTILE}"
    for row, before in zip(results["rows"], clean["rows"], strict=True):
        row["group"] = before["group"]
        row["by_kind"] = {free: {"questions": 1, "em": 1.0}}
    for curve in results["curves"]:
        curve["metrics"] = {free: [[0, 1.0]]}
    for name in ("world", "config", "versions"):
        results[name] = {free: f"{name}{HOSTILE}"}
    results["labels"] = {free: [[0.5, 3]], f"list{HOSTILE}": [f"item{HOSTILE}"]}
    results["trajectories"][0]["steps"][0]["error"] = f"error{HOSTILE}"
    results["trajectories"][0]["answer"] = f"guess{HOSTILE}"
    results["config"]["command"] = f"command{HOSTILE}"
    return results


def test_hostile_text_in_every_field_is_shown_as_text() -> None:
    results = _hostile_sample()
    page = _Page(render_report(results))
    assert page.tags.count("script") == 1, "a text became a script"
    assert "img" not in page.tags, "a text became an element"
    assert not [name for name, _ in page.attributes if name.startswith("on")], "a text became an event handler"
    spoken = " ".join([page.text, *(value for _, value in page.attributes)])
    for text in [*_texts(results), f"key{HOSTILE}"]:
        assert text in spoken, f"{text!r} is not shown as it is"


def _texts(value: object) -> list[str]:
    if isinstance(value, dict):
        return [text for item in value.values() for text in _texts(item)]
    if isinstance(value, list):
        return [text for item in value for text in _texts(item)]
    return [value] if isinstance(value, str) and HOSTILE in value else []


def test_only_our_own_script_may_run(html: str) -> None:
    script = _found(r"<script>(.*)</script>", html)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in html, "the policy would block the page's own script"


def test_lone_surrogates_and_right_to_left_marks_do_not_stop_the_page(tmp_path: Path) -> None:
    results = sample(1)
    results["trajectories"][0]["answer"] = "a\ud800b\u202e"
    write_report(results, tmp_path / "report.html")
    assert "a\\ud800b" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_identical_candidates_are_merged_and_the_best_score_comes_first() -> None:
    results = sample(1)
    same = {"text": "<search>who</search>", "reward": 0.5, "score": 0.1, "logprob": -1.0, "chosen": False}
    other = {"text": "no grammar at all", "reward": None, "score": 0.9, "logprob": None, "chosen": False}
    results["trajectories"][0]["steps"] = [
        {"candidates": [same, {**same, "chosen": True}, other], "documents": [], "error": None}
    ]
    article = _found(r"(<article.*?</article>)", render_report(results))
    assert "3 candidates, 2 distinct, by critic score" in article
    assert article.index("no grammar at all") < article.index(">who<"), "not sorted by score"
    assert article.count(">who<") == 1, "identical candidates were not merged"
    assert article.count('class="chosen"') == 1
    assert "\N{MULTIPLICATION SIGN}2" in article


def test_unlabelled_candidates_are_shown_without_values() -> None:
    results = sample(1)
    bare = {"text": "<answer>Port</answer>", "reward": None, "score": None, "logprob": None, "chosen": True}
    results["trajectories"][0]["steps"] = [{"candidates": [bare], "documents": [], "error": None}]
    article = _found(r"(<article.*?</article>)", render_report(results))
    assert "Port" in article
    assert "reward" not in article, "a missing reward was drawn"


def test_a_value_that_is_not_finite_interrupts_its_curve() -> None:
    results = sample(0)
    results["curves"] = [
        {"name": "DPO", "x": "step", "metrics": {"loss": [[0, 1.0], [1, math.nan], [2, 3.0], [3, 2.0]]}}
    ]
    page = render_report(results)
    assert page.count("<polyline") == 2
    assert "1 value not finite, left out" in page
    assert "nan" not in _Page(page).text.split()


def test_empty_results_still_make_a_page() -> None:
    results = sample(0)
    for key in ("rows", "comparisons", "curves", "stages"):
        results[key] = []
    for key in ("world", "labels", "config", "versions"):
        results[key] = {}
    results["seconds"] = 0.0
    assert "No trained agent in this run." in render_report(results)


def _spoil(path: str, value: object) -> dict:
    """The sample with the value at `path` ("rows.0.em") replaced, or removed for `...`."""
    results = copy.deepcopy(sample(2))
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    target = results
    for part in parents:
        target = target[part]
    if value is ...:
        del target[last]
    else:
        target[last] = value
    return results


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("title", ..., r"missing key in results; got no title"),
        ("titel", "x", r"unknown key in results; got titel"),
        ("rows.1.em", ..., r"missing key in results\.rows\[1\]; got no em"),
        ("rows.1.em", math.nan, r"results\.rows\[1\]\.em must be a number from 0 to 1; got nan"),
        ("rows.1.em", 62.5, r"results\.rows\[1\]\.em must be a number from 0 to 1; got 62\.5"),
        ("rows.0.em", True, r"results\.rows\[0\]\.em"),
        ("rows.0.group", "best", r"rows\[0\]\.group must be one of floor, baseline, trained, control, ceiling"),
        ("rows.0.group", ["floor"], r"rows\[0\]\.group must be one of"),
        ("rows.0.f1_interval", [0.5, 0.1], r"rows\[0\]\.f1_interval"),
        ("rows.0.by_kind.one hop.em", None, r"rows\[0\]\.by_kind\.one hop\.em"),
        ("rows.0.name", "DPO", r"rows must have unique names; got 'DPO'"),
        ("comparisons.0.holds", 1, r"comparisons\[0\]\.holds must be true or false"),
        ("curves.0.metrics.loss", [[1]], r"curves\[0\]\.metrics\.loss\[0\]"),
        ("trajectories.1.row", "nobody", r"trajectories\[1\]\.row names no row; got 'nobody'"),
        ("trajectories.1.steps.0.candidates.0.reward", "0.5", r"steps\[0\]\.candidates\[0\]\.reward"),
        ("trajectories.1.steps.0.candidates.0.chosen", ..., r"candidates\[0\]; got no chosen"),
        ("trajectories", {}, r"results\.trajectories must be a list"),
        ("seed", 1.5, r"results\.seed must be a whole number"),
        ("labels", [], r"results\.labels must be an object"),
    ],
)
def test_bad_results_are_refused_by_the_name_of_the_key(path: str, value: object, named: str) -> None:
    with pytest.raises(InputError, match=named):
        check_results(_spoil(path, value))


def test_scale_has_round_ticks_around_its_values() -> None:
    assert scale_over([0.1, 0.93]).ticks == (0.0, 0.25, 0.5, 0.75, 1.0)
    assert scale_over([]).at(0.25) == 25.0
    constant = scale_over([7.0, 7.0], zero=False)
    assert constant.lo < 7 < constant.hi, "a constant has no axis"


def _run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "eval.report", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).resolve().parents[1], check=False)


def test_command_line_writes_the_page_and_says_what_is_wrong(tmp_path: Path) -> None:
    source, page = tmp_path / "results.json", tmp_path / "report.html"
    source.write_text(json.dumps(sample(2)), encoding="utf-8")
    done = _run("--results", source, "--out", page)
    assert done.returncode == 0, done.stderr
    assert page.read_text(encoding="utf-8") == render_report(sample(2))
    same = _run("--results", source, "--out", source)
    assert same.returncode == 2
    assert same.stderr.startswith("error: --out must not be --results"), same.stderr
    assert json.loads(source.read_text(encoding="utf-8")), "the results were overwritten"


@pytest.mark.parametrize(("content", "named"), [(None, "cannot read"), (b"{", "no JSON"), (b"\xff", "no JSON")])
def test_unreadable_results_are_named(tmp_path: Path, content: bytes | None, named: str) -> None:
    source = tmp_path / "results.json"
    if content is not None:
        source.write_bytes(content)
    with pytest.raises(InputError, match=named):
        read_results(source)
