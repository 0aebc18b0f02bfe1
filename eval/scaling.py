"""Scaling curves on the embedded world: more training questions for the critic, and more candidates to pick from.

    for s in 0 1 2; do python -m train.sft synthhop --seed $s --out runs/sft$s; done
    python -m eval.scaling --models runs/sft0/model runs/sft1/model runs/sft2/model --out runs/scaling

The warm start of each seed collects 8 labelled candidates for every state of 560 questions, and 560, 280, 140 and 70 of
these questions train a critic each, all for the same number of steps. On the test questions the critic picks among 8
samples of the warm start at every state; and that of 560 questions among 1, 2, 4, 8 and 16.

Written down before the run: EM rises along both curves, the end above the start by at least .02 with an interval above
0, pooled over three seeds. About five minutes a seed on two CPU cores. Writes scaling.svg and results.json into --out,
and continues an unfinished run.

Found, mean EM of seeds 0, 1, 2 (the warm start alone, greedy: .464): with 1, 2, 4, 8, 16 candidates .452, .534, .598,
.652, .692, end - start +.240 (+.211 to +.268); with 70, 140, 280, 560 questions .612, .627, .629, .652, end - start
+.040 (+.020 to +.059). So both gains hold, and both curves rise at every point.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from eval.pooled import pooled_difference
from jraggym.errors import InputError, exit_on_input_error
from jraggym.porting.pretrained import open_model
from jraggym.preemption import preemptible
from jraggym.recipes.scaling import Scale, measure, pooled_mean, scaling_settings
from jraggym.recipes.settings import Settings
from train.job import claim, prepare, write
from train.results import Console

LEAST = 0.02
TITLES = {"questions": "questions that the critic learns from", "candidates": "candidates that it picks from"}
Curves = Mapping[str, Mapping[int, Sequence[np.ndarray]]]  # curve -> point -> em [questions] of each seed


@dataclass(frozen=True)
class Arguments:
    """Measures how EM grows with the critic's training questions and with the candidates it picks from."""

    models: tuple[Path, ...] = (Path("runs/sft0/model"), Path("runs/sft1/model"), Path("runs/sft2/model"))
    """Folders of the warm starts, trained with the seeds of --seeds."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each decides its world and every draw."""
    out: Path = Path("runs/scaling")
    """Folder of data, critics, points, results.json and scaling.svg."""
    scale: Scale = field(default_factory=Scale)
    settings: Settings = field(default_factory=Settings)


def run(arguments: Arguments) -> dict[str, Any]:
    """Measures all points of all seeds, and writes results.json and scaling.svg."""
    if len(arguments.models) != len(arguments.seeds) or len(set(arguments.seeds)) < len(arguments.seeds):
        got = f"{len(arguments.models)} models, seeds {arguments.seeds}"
        raise InputError("each model needs a seed of its own", got=got, remedy="Give --models and --seeds in order.")
    starts = [open_model(path, "actor") for path in arguments.models]
    claim(arguments.out, {"experiment": "scaling", **_plain(arguments)})
    console, runs = Console(), []
    for seed, start in zip(arguments.seeds, starts, strict=True):
        settings = scaling_settings(arguments.settings, arguments.scale)
        settings = dataclasses.replace(settings, seed=seed, model=start.config)
        out = arguments.out / f"seed{seed}"
        out.mkdir(exist_ok=True)
        with console.stage(f"seed {seed}"):
            shop = prepare(settings, "synthhop", None, out, console.progress, start.tokenizer)
            runs.append(measure(shop, start.weights, arguments.scale))
    curves = {name: {at: [run[name][at] for run in runs] for at in runs[0][name]} for name in runs[0]}
    results = {"seeds": list(arguments.seeds), "stages": console.stages, **summary(curves)}
    write(arguments.out / "results.json", json.dumps(results, indent=1))
    write(arguments.out / "scaling.svg", draw(curves))
    return results


def _plain(arguments: Arguments) -> dict[str, Any]:
    return {key: value for key, value in dataclasses.asdict(arguments).items() if key != "out"}


def summary(curves: Curves) -> dict[str, Any]:
    """Each point's mean EM, 95 % interval (by questions within each seed) and seeds; and the claim of each curve."""
    found: dict[str, Any] = {}
    for name, points in curves.items():
        found[name] = []
        for at, seeds in points.items():
            mean, low, high = pooled_mean(seeds)
            each = [float(em.mean()) for em in seeds]
            found[name].append({"at": at, "em": mean, "interval": [low, high], "seeds": each})
    found["claims"] = {name: _claim(list(curves[name].values())) for name in TITLES}
    return found


def _claim(points: Sequence[Sequence[np.ndarray]]) -> dict[str, Any]:
    mean, low, high = pooled_difference(list(zip(points[-1], points[0], strict=True)))
    means = [float(np.mean([em.mean() for em in seeds])) for seeds in points]
    rises = all(b >= a for a, b in itertools.pairwise(means))
    return {"gain": mean, "interval": [low, high], "rises": rises, "holds": bool(mean >= LEAST and low > 0)}


def draw(curves: Curves) -> str:
    """The two curves as SVG: the mean with its interval, each seed thin, and the actor alone as a dotted line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    alone = pooled_mean(curves["greedy"][0])[0]
    for axes, (name, title) in zip(figure.subplots(1, 2, sharey=True), TITLES.items(), strict=True):
        places = list(curves[name])
        means, lows, highs = zip(*(pooled_mean(seeds) for seeds in curves[name].values()), strict=True)
        for each in zip(*([em.mean() for em in seeds] for seeds in curves[name].values()), strict=True):
            axes.plot(places, each, color="C0", alpha=0.3, linewidth=1)
        axes.fill_between(places, lows, highs, color="C0", alpha=0.15)
        axes.plot(places, means, "o-", color="C0", linewidth=2.5, label=f"mean of {len(curves['greedy'][0])} seeds")
        axes.axhline(alone, color="0.4", linestyle=":", label="the actor alone, greedy")
        axes.set_xscale("log", base=2)
        axes.set_xticks(places, [str(place) for place in places])
        axes.set_xlabel(title)
        axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="upper left")
    figure.axes[0].set_ylabel("exact match")
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


def main() -> None:
    with exit_on_input_error(), preemptible():
        results = run(tyro.cli(Arguments, description=__doc__))
    for name in ("greedy", *TITLES):
        for point in results[name]:
            (low, high), seeds = point["interval"], " ".join(f"{em:.3f}" for em in point["seeds"])
            print(f"{name:10} {point['at']:4}  EM {point['em']:.3f} ({low:.3f} to {high:.3f})  seeds {seeds}")
    for name, found in results["claims"].items():
        (low, high), verdict = found["interval"], "holds" if found["holds"] else "does not hold"
        rises = "rises at every point" if found["rises"] else "does not rise at every point"
        print(f"{name}: end - start {found['gain']:+.3f} ({low:+.3f} to {high:+.3f}), {verdict}; {rises}")


if __name__ == "__main__":
    main()
