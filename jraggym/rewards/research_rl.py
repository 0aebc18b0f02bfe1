"""ReSearch's reward (arXiv 2503.19470): 0 for bad form, else F1, or 0.1 where it is 0.

The published code gives 0 to an episode that the model did not end, too; the paper has no such rule.
"""

from __future__ import annotations

from jraggym.rewards.answer import hotpot_f1
from jraggym.rewards.combine import all_of, gate, or_else
from jraggym.rewards.form import ended, valid_sequence

research_rl_paper = gate(valid_sequence, or_else(hotpot_f1, 0.1))
research_rl = gate(all_of(valid_sequence, ended), or_else(hotpot_f1, 0.1))
