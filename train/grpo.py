"""Group-relative policy optimisation: python -m train.grpo synthhop [--out DIR] [--seed N] [any other field]

The experiments are the files configs/grpo_*.py; `python -m train.grpo synthhop --help` lists every field.
"""

from __future__ import annotations

from configs import grpo_synthhop, grpo_synthhop_outcome, grpo_synthhop_steps, llama_8b, llama_70b
from jraggym.recipes.online import train_sampled
from train.job import entry

EXPERIMENTS = {
    "synthhop": ("process rewards for the candidates of a state", grpo_synthhop.EXPERIMENT),
    "synthhop-outcome": ("outcome rewards for whole episodes", grpo_synthhop_outcome.EXPERIMENT),
    "synthhop-steps": ("process and outcome rewards for whole episodes", grpo_synthhop_steps.EXPERIMENT),
    "llama-8b": ("Llama-3.1-8B, on a slice of a pod", llama_8b.GRPO),
    "llama-70b": ("Llama-3.1-70B, on a slice of a pod", llama_70b.GRPO),
}


def main() -> None:
    entry(EXPERIMENTS, train_sampled)


if __name__ == "__main__":
    main()
