"""Collecting process data: python -m train.collect synthhop [--out DIR] [--seed N] [any other field]

The experiments are the files configs/collect_*.py; `python -m train.collect synthhop --help` lists every field.
"""

from __future__ import annotations

from configs import collect_synthhop, llama_8b
from jraggym.recipes.collecting import collect_data
from train.job import entry

EXPERIMENTS = {
    "synthhop": ("the embedded world, labelled by its judge", collect_synthhop.EXPERIMENT),
    "llama-8b": ("Llama-3.1-8B, on a slice of a pod", llama_8b.COLLECT),
}


def main() -> None:
    entry(EXPERIMENTS, collect_data)


if __name__ == "__main__":
    main()
