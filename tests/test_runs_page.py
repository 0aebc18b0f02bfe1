"""The page of several evaluations: the paper's figures as printed, ours beside them, and text stays text."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest
from test_report import HOSTILE, _Page

from eval.report import Arguments, main
from eval.runs_view import build, published, read_runs
from jraggym.agent_episodes import AgentRules
from jraggym.agents.episode import Costs, Episode
from jraggym.agents.output import ANSWER, CLAIMS, QUERY, REASONING, format_output
from jraggym.episode_log import EpisodeLog
from jraggym.errors import InputError
from jraggym.evaluation import answer_scores
from jraggym.types import Answer, Candidate, Document, Example, Search, State, Step, Trajectory, Turn

PAPER = published()
EXAMPLES = [Example(f"q{i}", f"Who is {i}? {HOSTILE}", ("Ada Lovelace",), "2-hop") for i in range(4)]
SO = {REASONING: f"I think {HOSTILE}", CLAIMS: "none"}


def episode(example, answer):
    """One search with documents and a digest among three candidates, then an answer."""
    query, start = f"query {HOSTILE}", State(example.question)
    texts = [format_output({ANSWER: "Ada", QUERY: query}, SO), f"no action {HOSTILE}", "no action"]
    candidates = tuple(Candidate(text, score=0.5 - i) for i, text in enumerate(texts))
    turn = Turn(Search(query, so_far="Ada"), (Document("d", f"title {HOSTILE}", HOSTILE),), None, f"digest {HOSTILE}")
    middle = State(example.question, (turn,))
    last = (Candidate(format_output({ANSWER: answer, QUERY: None}, SO), score=0.1),)
    final = State(example.question, (turn,), answer=Answer(answer).text)
    steps = (Step(start, candidates, 0), Step(middle, last, 0))
    return Episode(Trajectory(example.id, steps, final), Costs(2, 4, 2, searches=1, tokens=30, dollars=0.5))


@pytest.fixture
def make(tmp_path):
    def make(
        name,
        answers,
        examples=EXAMPLES,
        agent="re2search",
        benchmark="hotpotqa",
        split="test1000",
        method="ZSL",
        model=None,
        critic=None,
    ):
        log = EpisodeLog(tmp_path / name / "episodes.jsonl")
        episodes = [episode(example, answer) for example, answer in zip(examples, answers, strict=True)]
        for example, found in zip(examples, episodes, strict=True):
            log.add(example, found)
        about = {"agent": agent, "benchmark": benchmark, "split": split, "method": method}
        about |= {"model": model or f"m {HOSTILE}", "critic": critic}
        results = {**about, "rules": asdict(AgentRules()), **answer_scores(examples, episodes, 0)}
        (tmp_path / name / "results.json").write_text(json.dumps(results))
        return tmp_path / name

    return make


RIGHT, WRONG = "Ada Lovelace", "Ada"


def test_published_averages_follow_from_their_rows_but_for_the_one_that_is_noted():
    wrong = [
        (row["method"], row["agent"])
        for row in PAPER["main"]
        for place, printed in enumerate(row["average"])
        if abs(sum(pair[place] for pair in row["scores"].values()) / 4 - printed) > 0.011
    ]
    assert wrong == [("PPO", "rag")]
    assert ["PPO", "rag"] in [error.get("row") for error in PAPER["errors"]]


def test_published_figures_are_those_of_the_paper():
    rows = {(row["method"], row["agent"]): row for row in PAPER["main"]}
    assert len(PAPER["main"]) == 5 * 6 + 1
    assert rows["ZSL", "re2search"]["scores"]["hotpotqa"] == [34.00, 44.91]
    assert rows["DPO", "re2search"]["average"] == [51.65, 58.82]
    assert rows["PRM", "re2search"]["scores"]["medqa"] == [71.72, 71.72]
    assert rows["PPO", "rag"]["average"] == [41.63, 41.44]
    assert [row["average_f1"] for row in PAPER["transfer"][:2]] == [61.06, 65.30]
    ours = [row for row in PAPER["outcome_rl"] if row["method"] == "Re2Search++"]
    assert [row["average"] for row in ours] == [[50.20, 60.50, 61.14], [48.11, 54.37, 58.11]]
    assert ours[1]["scores"]["bamboogle"] == [52.94, 56.30, 63.51]
    assert not any(abs(right / 125 - 0.5294) < 5e-5 for right in range(126)), "the note says that it cannot be"
    assert any(abs(right / 119 - 0.5294) < 5e-5 for right in range(120))


def test_ours_stand_beside_the_papers_with_differences_worked_out_by_hand(make):
    a, b = make("a", [RIGHT] * 3 + [WRONG]), make("b", [RIGHT, WRONG, WRONG, WRONG], EXAMPLES[::1], agent="react")
    found = build(read_runs([a, b]), 2)
    assert found["columns"] == [("HotpotQA test1000", 4)]
    cells = [row["cells"][0] for row in found["rows"]]
    assert [cell["em"]["mean"] for cell in cells] == [0.75, 0.25]
    assert [cell["paper"] for cell in cells] == [[34.00, 44.91], [30.70, 41.09]]
    assert [cell["short"] for cell in cells] == [4, 4], "the paper asked 1,000 questions"
    [(_, [pair])] = found["tests"]
    (em, em_low, em_high), (f1, *_) = pair["differences"]
    # two of the four questions differ by 1 in EM, and by 1 - 2/3 in F1
    assert (em, f1) == pytest.approx((0.5, 2 / 4 / 3))
    assert 0 <= em_low < em < em_high <= 1
    assert len(found["episodes"]) == 4
    shown = [episode["example_id"] for episode in found["episodes"]]
    assert shown[:2] == shown[2:], "the same questions of both"


def test_an_actor_with_a_carried_critic_stands_beside_the_papers(make):
    told = {"model": "gpt-4o-mini", "method": "GPT-4o-mini + critic"}
    runs = [make("zero", [RIGHT] * 4, **told), make("picked", [RIGHT] * 4, critic="runs/critic/model", **told)]
    runs.append(make("react", [RIGHT] * 4, agent="react", **told))
    found = [row["cells"][0]["paper"] for run in runs for row in build(read_runs([run]), 0)["rows"]]
    assert found == [[43.7, 56.62], [46.4, 59.44], None]
    tuned = make("++", [RIGHT] * 4, method="DPO", model="runs/dpo/model", critic="runs/critic/model")
    prm, odd = (make(method, [RIGHT] * 4, method=method, critic="runs/critic/model") for method in ("PRM", "SFT"))
    found = [build(read_runs([run]), 0) for run in (tuned, prm, odd)]
    assert [one["rows"][0]["cells"][0]["paper"] for one in found] == [[46.5, 60.19], [44.1, 56.84], None]
    assert [one["runs"][0]["paper_searches"] for one in found] == [None, None, None]
    both = build(read_runs([make("plain", [RIGHT] * 4, method="DPO"), tuned]), 0)["rows"]
    assert len(both) == 2


def test_searches_stand_beside_the_papers(make):
    told = ({"model": "gpt-4o-mini"}, {"method": "DPO"}, {"agent": "react"}, {"split": "dev"})
    runs = [make(str(number), [RIGHT] * 4, **fields) for number, fields in enumerate(told)]
    assert [run["paper_searches"] for run in build(read_runs(runs), 0)["runs"]] == [None, 3.2, None, None]


def test_the_other_published_tables_are_those_of_the_paper():
    sources = {row["labels"]: row for row in PAPER["sources"]}
    assert sources["GPT-4o"]["scores"]["medqa"] == [71.96, 71.96]
    assert (sources["roll-outs"]["scores"]["twowiki"], sources["roll-outs"]["agreement"]) == ([42.94, 49.57], 71.03)
    scaling = {row["what"]: row["scores"] for row in PAPER["scaling"]}
    assert scaling["10 candidates"] == scaling["1,000 training questions"]
    assert {name: pair[1] for name, pair in sources["GPT-4o"]["scores"].items()} == {
        **scaling["10 candidates"],
        "medqa": 71.96,  # an error that is noted
    }
    assert PAPER["searches"][-1]["means"]["medqa"] == 5.6


def test_averages_need_all_four_data_sets(make):
    places = {"hotpotqa": "test1000", "twowiki": "test1000", "bamboogle": "test", "medqa": "test"}
    runs = [
        make(name, [RIGHT] * i + [WRONG] * (4 - i), benchmark=name, split=split)
        for i, (name, split) in enumerate(places.items())
    ]
    [row] = build(read_runs(runs), 0)["rows"]
    assert row["average"] == pytest.approx(((0 + 1 + 2 + 3) / 16, (4 + (1 + 2) + 2 + 2 + 2 + (3 + 1 / 3)) / 16), abs=1)
    assert row["average"][0] == pytest.approx(6 / 16)
    assert build(read_runs(runs[:3]), 0)["rows"][0]["average"] is None


def test_runs_of_other_questions_are_not_compared_and_a_second_one_has_its_own_row(make):
    a, b = make("a", [RIGHT] * 4), make("b", [RIGHT] * 2, EXAMPLES[:2])
    found = build(read_runs([a, b]), 1)
    assert [pair["differences"] for _, pairs in found["tests"] for pair in pairs] == [None]
    assert [row["folder"] for row in found["rows"]] == [str(a), str(b)]


def test_another_split_has_no_published_figure_beside_it(make):
    [row] = build(read_runs([make("a", [RIGHT] * 4, split="dev")]), 0)["rows"]
    assert row["cells"][0]["paper"] is None


def test_the_page_holds_everything_and_hostile_text_stays_text(make, tmp_path, capsys):
    out = tmp_path / "page.html"
    folders = (make("a", [RIGHT] * 4), make("b", [WRONG] * 4, agent="search_o1"))
    main(Arguments(out, runs=folders, trajectories=2))
    html = out.read_text()
    page = _Page(html)
    assert page.tags.count("script") == 1
    assert "img" not in page.tags
    assert not [value for name, value in page.attributes if name.startswith("on")]
    links = [value for name, value in page.attributes if name in ("src", "href", "srcset", "action", "data", "poster")]
    assert all(link.startswith("#") or link == "data:," for link in links), links
    for said in ("I think", "query", "no action", "title", "digest", "Who is"):
        assert f"{said} " in page.text
        assert HOSTILE in page.text
    for shown in ("paper 34.00", "paper 35.30", "Re2Search", "Search-o1", "answer so far: Ada", "41.44", "119"):
        assert shown in page.text
    assert "33.3" in re.sub(r"\s+", " ", page.text), "F1 1 - 2/3 between the two, in points"


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda path: path.unlink(), "cannot read"),
        (lambda path: path.write_text("[1]"), "holds no evaluation"),
        (lambda path: path.write_text("{}"), "no method, agent"),
        (lambda path: path.write_text("{"), "cannot read"),
    ],
)
def test_what_is_no_evaluation_is_named(make, spoil, said):
    folder = make("a", [RIGHT] * 4)
    spoil(folder / "results.json")
    with pytest.raises(InputError, match=said):
        read_runs([folder])


def test_a_run_twice_and_no_source_at_all_are_refused(make):
    folder = make("a", [RIGHT] * 4)
    with pytest.raises(InputError, match="comes twice"):
        read_runs([folder, folder])
    with pytest.raises(InputError, match="one of --results and --runs"):
        main(Arguments(Path("page.html")))
