"""Learning curves of on-policy runs: EM against sampled tokens, over seeds.

    python -m eval.learning --runs runs/grpo0 runs/grpo1 runs/grpo-outcome0 ... --out runs/learning.html

Runs of one kind (say "GRPO, process rewards") with different seeds belong together. Two questions are asked of every
kind, and were written down before the runs:

* does it raise EM over its start by at least .10, with an interval above 0?
* does it learn faster than the kind with outcome rewards: is its mean EM over the same range of sampled tokens higher,
  with an interval above 0? (Curves are linear between evaluations and end at the shortest run's tokens.)

Runs of train.transcripts know their oracle: does EM rise by half of the way to it or more? They also tell how often
they search, and how they fare with a broken retriever. A kind whose name goes on behind another's ("..., no mask",
"..., broken retriever") is a control: does the whole recipe end higher? `--beside` lays main jobs next to them, seed
by seed: DPO + critic against the run's EM at as many tokens as were sampled for the main job's process data.

Differences are paired by question; intervals come from resampling questions within each seed.
"""

from __future__ import annotations

import io
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import numpy as np
import tyro

from eval.pooled import pooled_difference
from jraggym.errors import InputError, exit_on_input_error

LEAST, GRID = 0.10, 101


@dataclass(frozen=True)
class Arguments:
    """Compares on-policy runs."""

    runs: tuple[Path, ...]
    """Their --out folders."""
    out: Path | None = None
    """A web page with the curves."""
    beside: tuple[Path, ...] = ()
    """--out folders of train.quickstart, of the same seeds."""


@dataclass(frozen=True)
class Episodes:
    """What a run of train.transcripts knows besides."""

    oracle: float  # EM of the ceiling
    broken: float  # EM at the end when searches bring random documents
    first: Mapping[str, float]  # searches at the start by the number that a question needs
    last: Mapping[str, float]  # at the end


@dataclass(frozen=True)
class Run:
    """One run: EM of every question at every evaluation."""

    kind: str
    seed: int
    tokens: np.ndarray  # [points]
    em: np.ndarray  # [points, questions]
    episodes: Episodes | None = None

    def at(self, tokens: np.ndarray) -> np.ndarray:
        """Each question's EM [X, questions] at so many sampled tokens [X]; at more than the run's, that of its end."""
        tokens = np.clip(tokens, self.tokens[0], self.tokens[-1])
        place = np.clip(np.searchsorted(self.tokens, tokens, side="right") - 1, 0, len(self.tokens) - 2)
        left, right = self.tokens[place], self.tokens[place + 1]
        share = ((tokens - left) / (right - left))[:, None]
        return (1 - share) * self.em[place] + share * self.em[place + 1]

    def mean_until(self, budget: float) -> np.ndarray:
        """Each question's EM [questions], averaged over 0 to `budget` sampled tokens."""
        return self.at(np.linspace(0.0, budget, GRID)).mean(axis=0)

    def half_way(self, oracle: float) -> np.ndarray:
        """The middle of the start's EM [questions] and the oracle's."""
        return (self.em[0] + oracle) / 2


@dataclass(frozen=True)
class MainJob:
    """DPO + critic of a main job: EM of every question, and the tokens sampled for its process data."""

    seed: int
    tokens: float
    em: np.ndarray  # [questions]
    name: str


def read(folder: Path) -> Run:
    """A finished run; InputError when there is none."""
    path = folder / "results.json"
    try:
        found = json.loads(path.read_text())
        curve = found["curve"]
        tokens = np.array([point["sampled_tokens"] for point in curve], float)
        em = np.array([[float(digit) for digit in point["each"]] for point in curve])
        episodes = None
        if "broken_retriever" in found:
            needs = [curve[i]["searches_by_need"] for i in (0, -1)]
            episodes = Episodes(found["oracle"], found["broken_retriever"]["em"], *needs)
        run = Run(str(found["experiment"]), int(found["seed"]), tokens, em, episodes)
    except (OSError, ValueError, KeyError, TypeError) as error:
        remedy = "Name the --out folder of a finished train.grpo, train.ppo or train.transcripts run."
        raise InputError(f"cannot read {path}", got=repr(error), remedy=remedy) from error
    if len(tokens) < 2 or (np.diff(tokens) <= 0).any():
        raise InputError(f"no curve in {path}", got=tokens.tolist(), remedy="Evaluate at two points or more.")
    return run


def read_main_job(folder: Path) -> MainJob:
    """The DPO + critic row of a finished main job; InputError when there is none."""
    try:
        scores, results = (json.loads((folder / name).read_text()) for name in ("scores.json", "results.json"))
        (name,) = (row for row in scores["em"] if row.startswith("DPO + critic"))
        return MainJob(scores["seed"], results["labels"]["sampled tokens"], np.array(scores["em"][name], float), name)
    except (OSError, ValueError, KeyError, TypeError) as error:
        remedy = "Name the --out folder of a finished train.quickstart run."
        raise InputError(f"cannot read {folder}", got=repr(error), remedy=remedy) from error


def by_kind(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs of each kind by seed; InputError when a kind has a seed twice."""
    kinds: dict[str, list[Run]] = defaultdict(list)
    for run in sorted(runs, key=lambda run: run.seed):
        kinds[run.kind].append(run)
    for kind, members in kinds.items():
        seeds = [run.seed for run in members]
        if len(set(seeds)) < len(seeds):
            raise InputError(f"{kind} has a seed twice", got=seeds, remedy="Name each run once.")
    return dict(kinds)


Verdict = tuple[str, list[float], tuple[float, float, float], bool]  # claim, each seed, (mean, low, high), holds


def verdicts(kinds: Mapping[str, Sequence[Run]]) -> list[Verdict]:
    """Whether each kind rises over its start, and learns faster than outcome rewards."""
    found = []
    budget = min(float(run.tokens[-1]) for runs in kinds.values() for run in runs)
    for kind, runs in kinds.items():
        pairs = [(run.em[-1], run.em[0]) for run in runs]
        found.append(_verdict(f"{kind}: end - start >= +{LEAST:.2f}", pairs, LEAST))
        half = [(run.em[-1], run.half_way(run.episodes.oracle)) for run in runs if run.episodes]
        if len(half) == len(runs):
            found.append(_verdict(f"{kind}: end - half of the way from start to oracle >= 0", half, 0.0))
    slow = {run.seed: run for kind, runs in kinds.items() if kind.endswith("outcome rewards") for run in runs}
    for kind, runs in kinds.items():
        both = [(run.mean_until(budget), slow[run.seed].mean_until(budget)) for run in runs if run.seed in slow]
        if both and not kind.endswith("outcome rewards"):
            claim = f"{kind}: mean EM until {budget:,.0f} tokens - the same with outcome rewards > 0"
            found.append(_verdict(claim, both, 0.0))
    return [*found, *_controls(kinds)]


def _controls(kinds: Mapping[str, Sequence[Run]]) -> list[Verdict]:
    """Each kind against its controls at the end, where seeds have both."""
    found = []
    for name, controls in kinds.items():
        for kind, runs in kinds.items():
            there = {run.seed: run for run in runs} if name.startswith(f"{kind}, ") else {}
            if pairs := [(there[run.seed].em[-1], run.em[-1]) for run in controls if run.seed in there]:
                found.append(_verdict(f"{kind}: end - {name.removeprefix(f'{kind}, ')} > 0", pairs, 0.0))
    return found


def beside(kinds: Mapping[str, Sequence[Run]], jobs: Sequence[MainJob]) -> list[Verdict]:
    """Each kind against the main jobs of its seeds, at their sampled tokens.

    Raises InputError for a seed without a main job or with two, and for main jobs of other questions or candidates.
    """
    by_seed, found = {job.seed: job for job in jobs}, []
    if len(by_seed) < len(jobs) or len({job.name for job in jobs}) > 1:
        got = [(job.seed, job.name) for job in jobs]
        raise InputError("these main jobs do not belong together", got=got, remedy="Name one of each seed.")
    for kind, runs in kinds.items():
        if missing := [run.seed for run in runs if run.seed not in by_seed]:
            raise InputError(f"{kind} has no main job beside it", got=missing, remedy="Name one of each seed.")
        mains = [by_seed[run.seed] for run in runs]
        sizes = [(run.em.shape[1], len(job.em)) for run, job in zip(runs, mains, strict=True)]
        if any(ours != theirs for ours, theirs in sizes):
            remedy = "Evaluate both on the test split (--evaluate test)."
            raise InputError(f"{kind} and its main jobs were asked other questions", got=sizes, remedy=remedy)
        pairs = [(run.at(np.array([job.tokens]))[0], job.em) for run, job in zip(runs, mains, strict=True)]
        tokens = ", ".join(f"{job.tokens:,.0f}" for job in mains)
        found.append(_verdict(f"{kind}: after {tokens} tokens - {mains[0].name} > 0", pairs, 0.0))
    return found


def _verdict(claim: str, pairs: Sequence[tuple[np.ndarray, np.ndarray]], least: float) -> Verdict:
    mean, low, high = pooled_difference(pairs)
    return claim, [float((a - b).mean()) for a, b in pairs], (mean, low, high), bool(mean >= least and low > 0)


def draw(kinds: Mapping[str, Sequence[Run]]) -> str:
    """The curves as SVG: each seed thin, and the mean of a kind's seeds where all have a value."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, (kind, runs) in enumerate(kinds.items()):
        grid = np.linspace(0, min(run.tokens[-1] for run in runs), GRID)
        each = [np.interp(grid, run.tokens, run.em.mean(axis=1)) for run in runs]
        for run in runs:
            axes.plot(run.tokens, run.em.mean(axis=1), color=f"C{number}", alpha=0.3, linewidth=1)
        axes.plot(grid, np.mean(each, axis=0), color=f"C{number}", linewidth=2.5, label=f"{kind} ({len(runs)} seeds)")
    axes.set_xlabel("sampled tokens")
    axes.set_ylabel("exact match, greedy")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


def _episodes(kinds: Mapping[str, Sequence[Run]]) -> list[str]:
    """The table of runs that tell more of their episodes; searches by the number that a question needs."""
    lines = []
    for run in (run for runs in kinds.values() for run in runs):
        if (more := run.episodes) is not None:
            start, end = (", ".join(f"{need}: {by[need]:.1f}" for need in sorted(by)) for by in (more.first, more.last))
            lines.append(f"| {run.kind} | {run.seed} | {more.oracle:.3f} | {more.broken:.3f} | {start} | {end} |")
    head = "| run | seed | oracle | broken retriever | searches by need, at the start | at the end |"
    return ["", head, "|---" * 6 + "|", *lines] if lines else []


def main(arguments: Arguments) -> None:
    """Prints the tables and writes the page."""
    kinds = by_kind([read(folder) for folder in arguments.runs])
    jobs = [read_main_job(folder) for folder in arguments.beside]
    lines = ["| run | seed | sampled tokens | EM at the start | EM at the end |", "|---" * 5 + "|"]
    for kind, runs in kinds.items():
        for run in runs:
            ends = " | ".join(f"{run.em[i].mean():.3f}" for i in (0, -1))
            lines.append(f"| {kind} | {run.seed} | {run.tokens[-1]:,.0f} | {ends} |")
    lines += [f"| {job.name} | {job.seed} | {job.tokens:,.0f} | | {job.em.mean():.3f} |" for job in jobs]
    lines += _episodes(kinds)
    lines += ["", "| claim | each seed | all | 95 % interval | verdict |", "|---" * 5 + "|"]
    for claim, each, (mean, low, high), holds in verdicts(kinds) + (beside(kinds, jobs) if jobs else []):
        gains, verdict = " ".join(f"{x:+.3f}" for x in each), "holds" if holds else "does not hold"
        lines.append(f"| {claim} | {gains} | {mean:+.3f} | {low:+.3f} to {high:+.3f} | {verdict} |")
    print("\n".join(lines))
    if arguments.out is not None:
        loader = jinja2.PackageLoader("eval", "templates")
        template = jinja2.Environment(loader=loader, autoescape=True).get_template("learning.html.j2")
        tables = [[row.strip("| ").split(" | ") for row in lines if row.startswith("| ")]]
        arguments.out.write_text(template.render(svg=draw(kinds), rows=tables[0]))


if __name__ == "__main__":
    with exit_on_input_error():
        main(tyro.cli(Arguments))
