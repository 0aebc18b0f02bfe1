"""Preference optimisation: python -m train.dpo synthhop [--out DIR] [--seed N] [any other field]

The experiments are the files configs/dpo_*.py; `python -m train.dpo synthhop --help` lists every field.
"""

from __future__ import annotations

from configs import dpo_agents, dpo_synthhop, llama_8b, llama_70b
from jraggym.recipes.offline import train_dpo
from train.job import entry

EXPERIMENTS = {
    "synthhop": ("good against worse candidates of the embedded world", dpo_synthhop.EXPERIMENT),
    "agents": ("full prompts of an agent of eval.qa, labelled by train.label", dpo_agents.EXPERIMENT),
    "llama-8b": ("all weights of Llama-3.1-8B, on a slice of a pod", llama_8b.DPO),
    "llama-70b": ("all weights of Llama-3.1-70B", llama_70b.DPO),
    "llama-70b-lora": ("adapters of Llama-3.1-70B", llama_70b.DPO_LORA),
}


def main() -> None:
    entry(EXPERIMENTS, train_dpo)


if __name__ == "__main__":
    main()
