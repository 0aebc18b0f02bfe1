"""Supervised fine-tuning: python -m train.sft synthhop [--out DIR] [--seed N] [any other field]

The experiments are the files configs/sft_*.py; `python -m train.sft synthhop --help` lists every field.
"""

from __future__ import annotations

from configs import sft_synthhop
from jraggym.recipes.offline import train_sft
from train.job import entry

EXPERIMENTS = {
    "synthhop": ("the warm start of the embedded world", sft_synthhop.EXPERIMENT),
}


def main() -> None:
    entry(EXPERIMENTS, train_sft)


if __name__ == "__main__":
    main()
