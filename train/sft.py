"""Supervised fine-tuning: python -m train.sft synthhop [--out DIR] [--seed N] [any other field]

The experiments are the files configs/sft_*.py; `python -m train.sft synthhop --help` lists every field.
"""

from __future__ import annotations

from configs import llama_8b, llama_70b, sft_agents, sft_synthhop
from jraggym.recipes.offline import train_sft
from train.job import entry

EXPERIMENTS = {
    "synthhop": ("the warm start of the embedded world", sft_synthhop.EXPERIMENT),
    "agents": ("full prompts of an agent of eval.qa, labelled by train.label", sft_agents.EXPERIMENT),
    "llama-8b": ("all weights of Llama-3.1-8B, on a slice of a pod", llama_8b.SFT),
    "llama-70b": ("all weights of Llama-3.1-70B", llama_70b.SFT),
    "llama-70b-lora": ("adapters of Llama-3.1-70B", llama_70b.SFT_LORA),
}


def main() -> None:
    entry(EXPERIMENTS, train_sft)


if __name__ == "__main__":
    main()
