"""What the page of several evaluations shows: the paper's table with our figures, paired tests, and trajectories.

Everything is computed from the results.json and episodes.jsonl of `eval.qa`; no markup is made here.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval import report_view as view
from jraggym.agents import AGENTS
from jraggym.agents.episode import Episode
from jraggym.environment import outcome
from jraggym.episode_log import EpisodeLog
from jraggym.errors import InputError
from jraggym.metrics import paired_bootstrap
from jraggym.types import Action, Answer, Example, Search

PUBLISHED = Path(__file__).with_name("published.json")
TITLES = {
    **{"hotpotqa": "HotpotQA", "twowiki": "2WikiMultihopQA", "musique": "MuSiQue", "bamboogle": "Bamboogle"},
    **{"medqa": "MedQA", "pubmedqa": "PubMedQA", "synthhop": "synthhop"},
}
NAMES = {
    **{"direct": "Direct", "cot": "CoT", "rag": "RAG", "react": "ReAct", "search_o1": "Search-o1"},
    **{"re2search": "Re2Search", "ircot": "IRCoT", "iter_retgen": "Iter-RetGen"},
}
_KEYS = ("method", "agent", "model", "benchmark", "split", "questions", "metrics", "costs", "faults", "each", "rules")


@dataclass(frozen=True)
class Run:
    """An evaluation: its folder and its results."""

    folder: Path
    results: Mapping[str, Any]

    @property
    def column(self) -> tuple[str, str]:
        return self.results["benchmark"], self.results["split"]

    @property
    def name(self) -> str:
        found = self.results
        return f"{found['method']} {NAMES.get(found['agent'], found['agent'])}, {found['model']}"


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The evaluations; raises InputError for a folder without finished results, or one that is named twice."""
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise InputError("a run comes twice", got=", ".join(map(str, folders)), remedy="Name each once.")
    runs = []
    for folder in folders:
        path, remedy = folder / "results.json", "Name the --out folder of a finished eval.qa."
        try:
            results = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"cannot read {path}", got=error, remedy=remedy) from error
        if not isinstance(results, dict) or (missing := [key for key in _KEYS if key not in results]):
            got = f"no {', '.join(missing)}" if isinstance(results, dict) else type(results).__name__
            raise InputError(f"{path} holds no evaluation", got=got, remedy=remedy)
        if results["agent"] not in AGENTS:
            raise InputError(f"unknown agent in {path}", got=repr(results["agent"]), remedy=remedy)
        runs.append(Run(folder, results))
    return runs


def published() -> dict[str, Any]:
    """The paper's tables, in percent, and what is wrong with them."""
    return json.loads(PUBLISHED.read_text(encoding="utf-8"))


def build(runs: Sequence[Run], trajectories: int = 12) -> dict[str, Any]:
    """The variables of runs.html.j2; of each evaluation so many trajectories, on the same questions of a data set."""
    paper = published()
    columns = list(dict.fromkeys(run.column for run in sorted(runs, key=_order)))
    titles = {column: f"{TITLES.get(column[0], column[0])} {column[1]}" for column in columns}
    return {
        "columns": [
            (titles[column], max(r.results["questions"] for r in runs if r.column == column)) for column in columns
        ],
        "rows": _rows(runs, columns, paper),
        "runs": [
            {
                **run.results,
                "name": run.name,
                "title": titles[run.column],
                "folder": str(run.folder),
                "paper_searches": _searches(run, paper),
            }
            for run in runs
        ],
        "tests": [(titles[column], list(_tests([run for run in runs if run.column == column]))) for column in columns],
        "paper": paper,
        "paper_columns": [TITLES[name] for name in paper["splits"]],
        "names": NAMES,
        "wrong": {tuple(error["row"]) for error in paper["errors"] if "row" in error},
        "episodes": view.episodes(list(_trajectories(runs, trajectories))),
    }


def _order(run: Run) -> int:
    return [*TITLES].index(run.column[0]) if run.column[0] in TITLES else len(TITLES)


def _rows(runs: Sequence[Run], columns: Sequence[tuple[str, str]], paper: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each method, agent and model, with the paper's figures for them (see `_theirs`)."""
    rows: list[dict[str, Any]] = []
    for run in runs:
        name = (run.results["method"], run.results["agent"], run.results["model"], _picked(run))
        free = (row for row in rows if row["key"] == name and run.column not in row["runs"])
        row = next(free, None)
        if row is None:  # a second evaluation of the same name on the same data set has a row of its own
            rows.append(row := {"key": name, "name": run.name, "runs": {}, "published": _theirs(run, paper)})
        row["runs"][run.column] = run
    for row in rows:
        row["cells"] = [_cell(row["runs"].get(column), column, row["published"], paper) for column in columns]
        row["average"] = _average(row["runs"], paper)
        row["folder"] = ", ".join(str(run.folder) for run in row["runs"].values())
    return rows


def _theirs(run: Run, paper: Mapping[str, Any]) -> dict[str, Any] | None:
    """The paper's row: by model, or as Re2Search++, where a critic was carried over; else by method and agent."""
    results, picked = run.results, _picked(run)
    plus = picked and results["method"] == "DPO"  # Re2Search++ is the tuned actor with the critic
    model = "llama-8b-dpo" if plus else results["model"].lower()
    for row in paper["transfer"] if results["agent"] == "re2search" else ():
        if row["model"].lower() == model and (row["method"] != "zero-shot") == picked:
            return {**row, "average": (None, row["average_f1"])}
    rows = [row for row in paper["main"] if (row["method"], row["agent"]) == (results["method"], results["agent"])]
    return rows[-1] if rows and picked == (results["method"] == "PRM") else None  # version 2 comes after version 1


def _picked(run: Run) -> bool:
    """Whether a critic picked among candidates."""
    return bool(run.results.get("critic"))


def _searches(run: Run, paper: Mapping[str, Any]) -> float | None:
    """The paper's searches a question, which it tells of Re2Search alone."""
    results, (name, split) = run.results, run.column
    means = {row["method"]: row["means"] for row in paper["searches"]}.get(results["method"], {})
    theirs = _theirs(run, paper)
    plain = theirs is not None and "agent" in theirs and theirs["agent"] == "re2search"
    return means.get(name) if plain and paper["splits"].get(name, (None,))[0] == split else None


def _cell(run: Run | None, column: tuple[str, str], theirs: Any, paper: Mapping[str, Any]) -> dict[str, Any] | None:
    split, number = paper["splits"].get(column[0], (None, 0))
    figures = theirs["scores"][column[0]] if theirs is not None and split == column[1] else None
    if run is None:
        return None
    metrics, count = run.results["metrics"], run.results["questions"]
    return {"em": metrics["em"], "f1": metrics["f1"], "paper": figures, "short": count if count != number else None}


def _average(found: Mapping[tuple[str, str], Run], paper: Mapping[str, Any]) -> tuple[float, float] | None:
    """EM and F1 over the paper's four data sets, where all four are there."""
    wanted = [(name, split) for name, (split, _) in paper["splits"].items()]
    if not all(column in found for column in wanted):
        return None
    metrics = [found[column].results["metrics"] for column in wanted]
    em, f1 = (sum(item[name]["mean"] for item in metrics) / len(metrics) for name in ("em", "f1"))
    return em, f1


def _tests(runs: Sequence[Run]) -> Iterator[dict[str, Any]]:
    """The paired differences of EM and F1 of each two evaluations on the same questions."""
    for left, right in itertools.combinations(runs, 2):
        ours, theirs = left.results["each"], right.results["each"]
        places = {id: place for place, id in enumerate(theirs["id"])}
        pair: dict[str, Any] = {"left": left.name, "right": right.name, "folders": f"{left.folder} − {right.folder}"}
        pair["unequal"] = len({run.results["rules"]["max_turns"] for run in (left, right)}) > 1
        if set(places) != set(ours["id"]):
            yield {**pair, "differences": None}
            continue
        order = [places[id] for id in ours["id"]]
        yield {
            **pair,
            "differences": [
                paired_bootstrap(ours[name], [theirs[name][place] for place in order], seed=0) for name in ("em", "f1")
            ],
        }


def _trajectories(runs: Sequence[Run], number: int) -> Iterator[dict[str, Any]]:
    for run in runs:
        ids = sorted(run.results["each"]["id"])
        wanted = set(random.Random(str(run.column)).sample(ids, min(number, len(ids))))
        found = [pair for pair in EpisodeLog(run.folder / "episodes.jsonl").read() if pair[0].id in wanted]
        for example, episode in sorted(found, key=lambda pair: pair[0].id):
            yield _page(run, example, episode)


def _page(run: Run, example: Example, episode: Episode) -> dict[str, Any]:
    """An episode for the browser: its turns and its answer, each with the candidates where a model was asked."""
    scores, final = outcome(episode.trajectory.final, example), episode.trajectory.final
    decided = {len(step.state.turns): step for step in episode.trajectory.steps}
    steps: list[dict[str, Any]] = []
    for number in sorted({*range(len(final.turns)), *decided}):
        turn = final.turns[number] if number < len(final.turns) else None
        candidates: list[dict[str, Any]] = []
        if number in decided:
            step, last = decided[number], number + 1 >= run.results["rules"]["max_turns"]
            for place, c in enumerate(step.candidates):
                read = _read(AGENTS[run.results["agent"]].parse(c.text, step.state, last), c.text)
                numbers = {"reward": c.reward, "score": c.score, "logprob": c.logprob}
                candidates.append({"text": c.text, "read": read, "chosen": place == step.chosen, **numbers})
        elif turn is not None:  # a search that needs no model, or a call that failed
            read = _read(turn.action, "")
            candidates.append(
                {"text": "", "read": read, "chosen": True, "reward": None, "score": None, "logprob": None}
            )
        documents = [{"title": d.title, "text": d.text} for d in turn.documents] if turn else []
        told = {"error": turn.error, "digest": turn.digest} if turn else {"error": None, "digest": None}
        steps.append({"candidates": candidates, "documents": documents, **told})
    return {
        **{"row": f"{run.name} ({run.folder})", "example_id": f"{run.column[0]} {example.id}", "steps": steps},
        **{"kind": f"{run.column[0]} {example.kind}".strip(), "question": example.question},
        **{"golds": list(example.answers), "answer": final.answer, "em": scores["em"], "f1": scores["f1"]},
    }


def _read(action: Action, text: str) -> tuple[str, str, str]:
    """(kind, body, thought) of a candidate; what is no action is shown as it was written, and why."""
    if isinstance(action, Search):
        so_far = "" if action.so_far is None else f"\nanswer so far: {action.so_far}"
        return "search", action.query + so_far, action.thought
    if isinstance(action, Answer):
        return "answer", action.text, action.thought
    return "other", text, action.reason
