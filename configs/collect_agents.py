"""The paper's collection: a judge ranks what an agent proposes at every turn, and the best is executed.

what      Re2Search with ten candidates a turn on training questions, each ranked by sufficiency, utility, redundancy
command   python -m train.collect agents-local --chat.model models/my-checkpoint --how.judge.key-variable OPENAI_API_KEY
          --benchmark hotpotqa --split train1000 --data-dir data/hotpotqa --out runs/agent-data
hardware  an accelerator for a local model of 8 billion weights (not run); none where both are asked over the network
expected  of a real judge unknown; `train.critic agents --data runs/agent-data/dataset` learns from it
"""

from __future__ import annotations

from dataclasses import replace

from jraggym.chats.connection import Server
from jraggym.chats.local import Local
from jraggym.recipes.agent_collecting import AgentCollect

EXPERIMENT = AgentCollect(Server("gpt-4o-mini"))
LOCAL = replace(EXPERIMENT, chat=Local("runs/export"))
OFFLINE = replace(LOCAL, how=replace(LOCAL.how, judge=Local("runs/export")))
