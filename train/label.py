"""Labelling collected data anew: python -m train.label synthhop [--rewards SOURCE] [--out DIR] [any other field]

The experiments are the files configs/label_*.py; `python -m train.label synthhop --help` lists every field.
"""

from __future__ import annotations

from configs import label_synthhop
from jraggym.recipes.labelling import label_data
from train.job import entry

EXPERIMENTS = {
    "synthhop": ("data of the embedded world, labelled by roll-outs", label_synthhop.EXPERIMENT),
}


def main() -> None:
    entry(EXPERIMENTS, label_data)


if __name__ == "__main__":
    main()
