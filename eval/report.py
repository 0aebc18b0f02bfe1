"""Turns the results of a run, or of several evaluations, into one self-contained web page.

    python -m eval.report --results runs/quickstart/results.json --out runs/quickstart/report.html
    python -m eval.report --runs runs/react runs/re2search --out runs/page.html

The second lays evaluations by `eval.qa` side by side, with the paper's figures beside ours (eval/runs_view.py).

The results of a run are one JSON object; `check_results` refuses a missing, unknown or wrong key by its name:

    title, dataset, created   str
    seed                      int
    seconds                   float        wall clock of the whole run
    versions                  {package: str}
    config                    {free}       shown as it is; its "command" (a text, if any) is the command to reproduce
    stages                    [{"name": str, "seconds": float, "detail": str}], in the order in which they ran
    rows                      [{"name": str (unique), "group": "floor" | "baseline" | "trained" | "control" | "ceiling",
                                "note": str, "questions": int,
                                "em", "f1": 0..1, "em_interval", "f1_interval": [lo, hi] (95 %),
                                "searches", "calls", "tokens": mean per question,
                                "malformed": 0..1 (share of the model's outputs), "failed": int (questions),
                                "by_kind": {kind: {"questions": int, "em": 0..1}}}]
    comparisons               [{"name": str, "claim": str, "difference": float (of exact match, -1..1),
                                "interval": [lo, hi], "holds": bool}]
    curves                    [{"name": str, "x": str, "metrics": {metric: [[x, value], ...]}}]; a value that is not
                              finite is counted and left out of the line
    world, labels             {free}; nested objects are flattened, a list of [value, count] pairs is a histogram
    trajectories              [{"row": str (names a row), "example_id", "kind", "question": str, "golds": [str],
                                "answer": str | null, "em", "f1": 0..1,
                                "steps": [{"candidates": [{"text": str, "reward", "score", "logprob": float | null,
                                                           "chosen": bool}],
                                           "documents": [{"title": str, "text": str}], "error": str | null}]}]

The headline compares the best trained row with the warm start: the first row whose name holds "warm start",
or else the best baseline. Every text is escaped, and the page's policy lets no script but its own run.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import tyro
from markupsafe import Markup

from eval import report_view as view
from eval import runs_view
from jraggym.errors import InputError, exit_on_input_error


class _Leaf(NamedTuple):
    """One plain value: what it must be, in words, and the test of it."""

    words: str
    accepts: Callable[[Any], bool]


class _Each(NamedTuple):
    """A JSON object with free keys, whose values all follow `schema`."""

    schema: Any


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _within(value: Any, lo: float = -math.inf, hi: float = math.inf) -> bool:
    return _number(value) and math.isfinite(value) and lo <= value <= hi


def _interval(value: Any, lo: float, hi: float) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) == 2
        and all(_within(end, lo, hi) for end in value)
        and value[0] <= value[1]
    )


_TEXT = _Leaf("a text", lambda value: isinstance(value, str))
_MAYBE_TEXT = _Leaf("a text or null", lambda value: value is None or isinstance(value, str))
_FLAG = _Leaf("true or false", lambda value: isinstance(value, bool))
_INTEGER = _Leaf("a whole number", lambda value: isinstance(value, int) and not isinstance(value, bool))
_COUNT = _Leaf("a whole number of at least 0", lambda value: _INTEGER.accepts(value) and value >= 0)
_AMOUNT = _Leaf("a finite number of at least 0", lambda value: _within(value, lo=0))
_SHARE = _Leaf("a number from 0 to 1", lambda value: _within(value, 0, 1))
_CHANGE = _Leaf("a number from -1 to 1", lambda value: _within(value, -1, 1))
_MAYBE_NUMBER = _Leaf("a finite number or null", lambda value: value is None or _within(value))
_INTERVAL = _Leaf("[lo, hi] with 0 <= lo <= hi <= 1", lambda value: _interval(value, 0, 1))
_CHANGE_INTERVAL = _Leaf("[lo, hi] with -1 <= lo <= hi <= 1", lambda value: _interval(value, -1, 1))
_POINT = _Leaf(
    "[x, value] with a finite x",
    lambda value: isinstance(value, list | tuple) and len(value) == 2 and _within(value[0]) and _number(value[1]),
)
_OBJECT = _Leaf("an object", lambda value: isinstance(value, Mapping))
_GROUP = _Leaf(f"one of {', '.join(view.GROUPS)}", lambda value: isinstance(value, str) and value in view.GROUPS)

_CANDIDATE = {"text": _TEXT, "reward": _MAYBE_NUMBER, "score": _MAYBE_NUMBER, "logprob": _MAYBE_NUMBER, "chosen": _FLAG}
_STEP = {"candidates": [_CANDIDATE], "documents": [{"title": _TEXT, "text": _TEXT}], "error": _MAYBE_TEXT}
_RESULTS = {
    **dict.fromkeys(("title", "dataset", "created"), _TEXT),
    "seed": _INTEGER,
    "seconds": _AMOUNT,
    "versions": _Each(_TEXT),
    "stages": [{"name": _TEXT, "seconds": _AMOUNT, "detail": _TEXT}],
    "rows": [
        {
            **{"name": _TEXT, "group": _GROUP, "note": _TEXT},
            **{"em": _SHARE, "em_interval": _INTERVAL, "f1": _SHARE, "f1_interval": _INTERVAL},
            **{"searches": _AMOUNT, "calls": _AMOUNT, "tokens": _AMOUNT, "malformed": _SHARE},
            **{"questions": _COUNT, "failed": _COUNT, "by_kind": _Each({"questions": _COUNT, "em": _SHARE})},
        }
    ],
    "comparisons": [
        {"name": _TEXT, "claim": _TEXT, "difference": _CHANGE, "interval": _CHANGE_INTERVAL, "holds": _FLAG}
    ],
    "curves": [{"name": _TEXT, "x": _TEXT, "metrics": _Each([_POINT])}],
    **dict.fromkeys(("config", "world", "labels"), _OBJECT),
    "trajectories": [
        {
            **dict.fromkeys(("row", "example_id", "kind", "question"), _TEXT),
            **{"golds": [_TEXT], "answer": _MAYBE_TEXT, "em": _SHARE, "f1": _SHARE, "steps": [_STEP]},
        }
    ],
}


def check_results(results: Any) -> None:
    """Raises InputError that names the missing, unknown or wrong key of `results` (the module's docstring)."""
    _check(results, _RESULTS, "results")
    names = [row["name"] for row in results["rows"]]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(
            "results.rows must have unique names", got=f"{twice[0]!r} more than once", remedy="Rename one of them."
        )
    for index, trajectory in enumerate(results["trajectories"]):
        if trajectory["row"] not in names:
            raise InputError(
                f"results.trajectories[{index}].row names no row",
                got=repr(trajectory["row"]),
                remedy=f"Use one of {', '.join(names) or '(there is no row)'}.",
            )


def _check(value: Any, schema: Any, path: str) -> None:
    if isinstance(schema, _Leaf):
        _require(schema.accepts(value), path, schema.words, value)
    elif isinstance(schema, list):
        _require(isinstance(value, list | tuple), path, "a list", value)
        for index, item in enumerate(value):
            _check(item, schema[0], f"{path}[{index}]")
    else:
        _require(isinstance(value, Mapping), path, "an object", value)
        if isinstance(schema, _Each):
            schema = dict.fromkeys(value, schema.schema)
        _check_keys(value, schema, path)
        for key, item in value.items():
            _check(item, schema[key], f"{path}.{key}")


def _require(holds: bool, path: str, words: str, value: Any) -> None:
    if not holds:
        raise InputError(f"{path} must be {words}", got=repr(value)[:80], remedy="Correct this value.")


def _check_keys(value: Mapping[str, Any], schema: Mapping[str, Any], path: str) -> None:
    if missing := [key for key in schema if key not in value]:
        raise InputError(f"missing key in {path}", got=f"no {', '.join(missing)}", remedy="Add it.")
    if unknown := [str(key) for key in value if key not in schema]:
        raise InputError(
            f"unknown key in {path}", got=", ".join(unknown), remedy=f"Known keys: {', '.join(map(str, schema))}."
        )


def render_report(results: Mapping[str, Any]) -> str:
    """The page as HTML; the same results give the same text. Raises InputError on results that do not fit."""
    check_results(results)
    return render_page("report.html.j2", view.build(results))


def render_page(template: str, variables: Mapping[str, Any]) -> str:
    """A page of our style and script; every value is escaped."""
    loader = jinja2.PackageLoader("eval", "templates")
    page = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page.filters.update(view.FILTERS)
    style, script = (loader.get_source(page, name)[0].strip() for name in ("report.css", "report.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return page.get_template(template).render(variables, style=Markup(style), script=Markup(script), digest=digest)


def write_report(results: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Writes the page to `path` in one move, in place of an earlier one; raises InputError as `render_report` does."""
    write_page(render_report(results), path)


def write_page(page: str, path: str | os.PathLike[str]) -> None:
    """Writes a page to `path` in one move; raises InputError when it cannot be written."""
    # a model can emit a lone surrogate, which UTF-8 has no bytes for: it is shown as \ud800
    content = page.encode("utf-8", "backslashreplace")
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise InputError(
            f"cannot write the report {path}", got=error.strerror, remedy="Name a writable folder."
        ) from error
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(part, 0o644)  # mkstemp makes it private, but a report is made to be shared
        os.replace(part, path)
    except OSError as error:
        os.unlink(part)
        raise InputError(f"cannot write the report {path}", got=error.strerror, remedy="Name a file.") from error


def read_results(path: Path) -> Any:
    """Reads results.json without checking its content; raises InputError when it cannot be read as JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}", got=error.strerror, remedy="Name a results.json.") from error
    except ValueError as error:  # not JSON, or not UTF-8
        raise InputError(f"{path} is no JSON file", got=str(error), remedy="Name a results.json.") from error


@dataclass(frozen=True)
class Arguments:
    """Writes the results of a run, or several evaluations side by side, as one self-contained web page."""

    out: Path  # the page to write
    results: Path | None = None  # the results.json of a run
    runs: tuple[Path, ...] = ()  # the --out folders of evaluations by eval.qa
    trajectories: int = 12  # of each evaluation, on the same questions


def main(arguments: Arguments) -> None:
    if (arguments.results is None) == (not arguments.runs):
        raise InputError("one of --results and --runs is needed", got="both or neither", remedy="Name one.")
    if arguments.results is None:
        found = runs_view.build(runs_view.read_runs(arguments.runs), arguments.trajectories)
        write_page(render_page("runs.html.j2", found), arguments.out)
    elif arguments.results.resolve() == arguments.out.resolve():
        raise InputError("--out must not be --results", got=arguments.out, remedy="Name another file for the page.")
    else:
        write_report(read_results(arguments.results), arguments.out)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    with exit_on_input_error():
        main(tyro.cli(Arguments))
