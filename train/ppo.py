"""Proximal policy optimisation: python -m train.ppo synthhop [--out DIR] [--seed N] [any other field]

The experiments are the files configs/ppo_*.py; `python -m train.ppo synthhop --help` lists every field.
"""

from __future__ import annotations

from configs import llama_8b, llama_70b, ppo_agents, ppo_synthhop, ppo_synthhop_critic
from jraggym.recipes.online import train_sampled
from train.job import entry

EXPERIMENTS = {
    "synthhop": ("process rewards for the candidates of a state", ppo_synthhop.EXPERIMENT),
    "synthhop-critic": ("critic scores as rewards", ppo_synthhop_critic.EXPERIMENT),
    "agents": ("new replies to an agent's full prompts, with a critic's scores", ppo_agents.EXPERIMENT),
    "llama-8b": ("Llama-3.1-8B, on a slice of a pod", llama_8b.PPO),
    "llama-70b": ("Llama-3.1-70B, on a slice of a pod", llama_70b.PPO),
}


def main() -> None:
    entry(EXPERIMENTS, train_sampled)


if __name__ == "__main__":
    main()
