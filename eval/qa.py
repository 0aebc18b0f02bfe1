"""How well does an agent answer? One agent, one chat model, one benchmark; perhaps a critic that picks its steps.

    python -m eval.qa server --chat.model gpt-4o-mini --chat.key-variable OPENAI_API_KEY --agent re2search \\
        --benchmark hotpotqa --split test1000 --data-dir data/hotpotqa --out runs/re2search
    python -m eval.qa local --chat.model models/my-checkpoint --agent cot --out runs/cot
    python -m eval.qa transfer --critic runs/critic/model --out runs/transfer

`server` is any OpenAI-compatible endpoint (--chat.base-url), `local` a model on this machine, and `transfer` the file
configs/qa_transfer.py. Writes episodes.jsonl, a line as soon as an episode ends, and results.json; a killed evaluation
that is started again asks for no finished episode, and ends with the same results. All questions count, an unfinished
one as 0. `python -m eval.report --runs A B ... --out page.html` lays evaluations side by side.
"""

from __future__ import annotations

import json
from typing import Any

import tyro

from configs import qa_transfer
from jraggym.chats.connection import Server
from jraggym.chats.local import Local
from jraggym.errors import exit_on_input_error
from jraggym.preemption import preemptible
from jraggym.recipes.qa import Qa, check, deciding, open_models, open_questions, open_retriever, run
from train.job import claim, write
from train.results import Console

EXPERIMENTS = {
    "server": ("a model behind an OpenAI-compatible server", Qa(Server("gpt-4o-mini"))),
    "local": ("a model on this machine", Qa(Local("runs/export"))),
    "transfer": ("a critic picks among a server's candidates", qa_transfer.EXPERIMENT),
}


def evaluate(qa: Qa) -> dict[str, Any]:
    """Runs the evaluation and writes results.json."""
    check(qa)
    questions = open_questions(qa)
    chat, scorer, summariser = open_models(qa)
    claim(qa.out, {"experiment": "qa", **deciding(qa)})
    console = Console()
    with console.stage("index", f"{len(questions.corpus)} documents"):
        retriever = open_retriever(qa, questions.corpus, qa.out)
    with console.stage("episodes", f"{len(questions.examples)} questions"):
        results = run(
            qa,
            questions,
            chat,
            retriever,
            scorer=scorer,
            summariser=summariser,
            report=lambda done, total: console.progress("episodes", done, total, None),
        )
    write(qa.out / "results.json", json.dumps(results, indent=1))
    return results


def table(results: dict[str, Any]) -> str:
    """The results as lines of text."""
    lines = [f"{results['agent']}, {results['model']}, {results['benchmark']} {results['split']}"]
    lines += [f"note: {note}" for note in results["notes"]]
    lines.append(f"{results['questions']} questions")
    for name, found in results["metrics"].items():
        low, high = found["interval"]
        lines.append(f"{name:10} {found['mean']:.3f}  ({low:.3f} to {high:.3f})")
    costs = dict(results["costs"])
    in_all = {**results["faults"], "dollars": f"{costs.pop('dollars_in_all'):,.4g}"}
    means = ", ".join(f"{name} {value:,.4g}" for name, value in costs.items())
    sums = ", ".join(f"{name} {value}" for name, value in in_all.items())
    return "\n".join([*lines, f"a question: {means}", f"in all: {sums}"])


def main() -> None:
    with exit_on_input_error(), preemptible():
        print(table(evaluate(tyro.extras.overridable_config_cli(EXPERIMENTS, description=__doc__))))


if __name__ == "__main__":
    main()
