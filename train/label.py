"""Labelling collected data anew: python -m train.label synthhop [--rewards SOURCE] [--out DIR] [any other field]

    python -m train.label synthhop --rewards llm --how.judge.model gpt-4o --how.judge.key-variable OPENAI_API_KEY
    python -m train.label synthhop-local --rewards llm --how.judge.model models/my-checkpoint
    python -m train.label agents --data runs/qa --how.judge.model gpt-4o --how.judge.key-variable OPENAI_API_KEY
    python -m train.label agents --data runs/qa --rewards rollouts --how.actor.model gpt-4o-mini

The judge, and the actor that goes on from an agent's candidates, are behind OpenAI-compatible servers
(--how.judge.base-url), or with `-local` models on this machine. `agents` labels what an agent of eval.qa proposed, for
`train.critic agents`. A killed job that is started again asks for nothing that was answered; at its end it tells what
the judge was asked, failed to rank, and cost.

The experiments are the files configs/label_*.py; `python -m train.label synthhop --help` lists every field.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import tyro

from configs import label_agents, label_synthhop
from jraggym.chats.local import Local
from jraggym.errors import exit_on_input_error
from jraggym.preemption import preemptible
from jraggym.recipes.agent_labels import AgentLabel, label_episodes
from jraggym.recipes.labelling import label_data
from train.job import claim, plain, run_experiment, write
from train.results import Console

EXPERIMENTS: dict[str, tuple[str, Any]] = {
    "synthhop": ("data of the embedded world, labelled by roll-outs", label_synthhop.EXPERIMENT),
    "agents": ("candidates of an evaluation's agent, ranked by a chat model", label_agents.EXPERIMENT),
}
EXPERIMENTS |= {  # a command line cannot turn one kind of chat model into the other
    f"{name}-local": (
        f"{about}; the chat models are on this machine",
        replace(experiment, how=replace(experiment.how, judge=Local("runs/export"), actor=Local("runs/export"))),
    )
    for name, (about, experiment) in EXPERIMENTS.items()
}


def label_agent(experiment: AgentLabel) -> dict[str, Any]:
    """Labels an evaluation's episodes, and writes `out`/results.json."""
    console = Console()
    claim(experiment.out, {"kind": type(experiment).__name__, **plain(experiment)})
    with console.stage("label", experiment.rewards):
        results = label_episodes(experiment, console.progress)
    write(experiment.out / "results.json", json.dumps(results, indent=1))
    print(json.dumps(results, indent=1))
    return results


def main() -> None:
    with exit_on_input_error(), preemptible():
        experiment = tyro.extras.overridable_config_cli(EXPERIMENTS, description=__doc__)
        if isinstance(experiment, AgentLabel):
            label_agent(experiment)
        else:
            run_experiment(experiment, label_data)


if __name__ == "__main__":
    main()
