"""Training a process reward model: python -m train.critic synthhop [--out DIR] [--seed N] [any other field]

The experiments are the files configs/critic_*.py; `python -m train.critic synthhop --help` lists every field.
"""

from __future__ import annotations

from configs import critic_agents, critic_synthhop, llama_8b, llama_70b
from jraggym.recipes.offline import train_critic_model
from train.job import entry

EXPERIMENTS = {
    "synthhop": ("pairs of the embedded world", critic_synthhop.EXPERIMENT),
    "agents": ("full prompts of an agent of eval.qa, labelled by train.label", critic_agents.EXPERIMENT),
    "llama-8b": ("Llama-3.1-8B, on a slice of a pod", llama_8b.CRITIC),
    "llama-70b": ("Llama-3.1-70B, on a slice of a pod", llama_70b.CRITIC),
}


def main() -> None:
    entry(EXPERIMENTS, train_critic_model)


if __name__ == "__main__":
    main()
