"""Labelling collected data anew: python -m train.label synthhop [--rewards SOURCE] [--out DIR] [any other field]

    python -m train.label synthhop --rewards llm --how.judge.model gpt-4o --how.judge.key-variable OPENAI_API_KEY
    python -m train.label synthhop-local --rewards llm --how.judge.model models/my-checkpoint

The first asks an OpenAI-compatible server (--how.judge.base-url), the second a model on this machine. A killed job that
is started again asks for nothing that was answered; at its end it tells what the judge was asked, failed to rank, and
cost. The experiments are the files configs/label_*.py; `python -m train.label synthhop --help` lists every field.
"""

from __future__ import annotations

from dataclasses import replace

from configs import label_synthhop
from jraggym.chats.local import Local
from jraggym.recipes.labelling import label_data
from train.job import entry

EXPERIMENTS = {
    "synthhop": ("data of the embedded world, labelled by roll-outs", label_synthhop.EXPERIMENT),
}
EXPERIMENTS |= {  # a command line cannot turn one kind of chat model into the other
    f"{name}-local": (
        f"{about}; the judge of llm is on this machine",
        replace(experiment, how=replace(experiment.how, judge=Local("runs/export"))),
    )
    for name, (about, experiment) in EXPERIMENTS.items()
}


def main() -> None:
    entry(EXPERIMENTS, label_data)


if __name__ == "__main__":
    main()
