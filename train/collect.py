"""Collecting process data: python -m train.collect synthhop [--out DIR] [--seed N] [any other field]

    python -m train.collect agents --chat.model my-model --chat.base-url http://localhost:8000/v1 \\
        --how.judge.model gpt-4o --how.judge.key-variable OPENAI_API_KEY --benchmark hotpotqa --split train1000 \\
        --data-dir data/hotpotqa --out runs/agent-data

`agents` runs an agent of eval.qa with its full prompts, a judge ranks the candidates of every turn, and its best is
executed; actor and judge are behind OpenAI-compatible servers, with `-local` the actor is on this machine, with
`-offline` both are. `train.critic agents --data runs/agent-data/dataset` learns from it. A killed job that is started
again asks for no finished episode.

The experiments are the files configs/collect_*.py; `python -m train.collect synthhop --help` lists every field.
"""

from __future__ import annotations

import json
from typing import Any

import tyro

from configs import collect_agents, collect_synthhop, llama_8b, llama_70b
from jraggym.errors import exit_on_input_error
from jraggym.preemption import preemptible
from jraggym.recipes.agent_collecting import AgentCollect, check_collection, collect_episodes, deciding_collection
from jraggym.recipes.collecting import collect_data
from jraggym.recipes.qa import open_questions
from train.job import claim, run_experiment, write
from train.results import Console

EXPERIMENTS: dict[str, tuple[str, Any]] = {
    "synthhop": ("the embedded world, labelled by its judge", collect_synthhop.EXPERIMENT),
    "llama-8b": ("Llama-3.1-8B, on a slice of a pod", llama_8b.COLLECT),
    "llama-70b": ("Llama-3.1-70B, on a slice of a pod", llama_70b.COLLECT),
    "agents": ("an agent's full prompts; actor and judge behind servers", collect_agents.EXPERIMENT),
    "agents-local": ("the same; the actor on this machine", collect_agents.LOCAL),
    "agents-offline": ("the same; actor and judge on this machine", collect_agents.OFFLINE),
}


def collect_agent(collect: AgentCollect) -> dict[str, Any]:
    """Runs the collection, and writes `out`/results.json."""
    check_collection(collect)
    questions, console = open_questions(collect), Console()
    claim(collect.out, {"experiment": "agent collection", **deciding_collection(collect)})
    with console.stage("episodes", f"{len(questions.examples)} questions"):
        results = collect_episodes(collect, questions, console.progress)
    write(collect.out / "results.json", json.dumps(results, indent=1))
    print(json.dumps(results["labels"], indent=1))
    return results


def main() -> None:
    with exit_on_input_error(), preemptible():
        experiment = tyro.extras.overridable_config_cli(EXPERIMENTS, description=__doc__)
        if isinstance(experiment, AgentCollect):
            collect_agent(experiment)
        else:
            run_experiment(experiment, collect_data)


if __name__ == "__main__":
    main()
