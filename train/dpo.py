"""Preference optimisation: python -m train.dpo synthhop [--out DIR] [--seed N] [any other field]

The experiments are the files configs/dpo_*.py; `python -m train.dpo synthhop --help` lists every field.
"""

from __future__ import annotations

from configs import dpo_synthhop
from jraggym.recipes.offline import train_dpo
from train.job import entry

EXPERIMENTS = {
    "synthhop": ("good against worse candidates of the embedded world", dpo_synthhop.EXPERIMENT),
}


def main() -> None:
    entry(EXPERIMENTS, train_dpo)


if __name__ == "__main__":
    main()
