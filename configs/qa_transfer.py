"""The paper's transfer experiment: our critic of a small model's steps picks among the candidates of a large one.

what      Re2Search by an actor behind an OpenAI-compatible server, ten candidates a step, the critic's best is executed
command   python -m eval.qa transfer --critic runs/critic/model --data-dir data/hotpotqa --corpus corpora/wiki.jsonl
          --encoder models/bge-base-en-v1.5 --out runs/transfer
hardware  an accelerator for the critic; the actor is asked over the network, about 3,000 prompts of ten completions
          each for 1,000 questions: some hours, and some ten US dollars of gpt-4o-mini (estimated, not run)
expected  published: 46.4 EM / 59.4 F1, and 43.7 / 56.6 without the critic (--critic None --rules.select first
          --rules.candidates 1 --rules.temperature 0)
"""

from __future__ import annotations

from pathlib import Path

from jraggym.agent_episodes import AgentRules
from jraggym.chats.connection import Server
from jraggym.recipes.qa import Qa

EXPERIMENT = Qa(
    Server("gpt-4o-mini", key_variable="OPENAI_API_KEY", prompt_price=0.15, completion_price=0.60),
    out=Path("runs/transfer"),
    method="GPT-4o-mini + critic",
    rules=AgentRules(max_turns=10, candidates=10, temperature=1.0, select="score", slots=64),
    critic="runs/critic/model",
    benchmark="hotpotqa",
    split="test1000",
    retriever="preset",
)
