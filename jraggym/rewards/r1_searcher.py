"""R1-Searcher's two stages (arXiv 2503.05592): first that the model searches at all, then what it makes of it."""

from __future__ import annotations

from jraggym.rewards.answer import cover_em, true_false_f1
from jraggym.rewards.combine import all_of, scaled, total
from jraggym.rewards.finished import Reward
from jraggym.rewards.form import free_of, in_order, occurs, searched, short_answer

_CHINESE = "[\u4e00-\u9fff]"
_CHAT = r"<\|im_(?:start|end)\|>|<\|(?:start_header|end_header|eot)_id\|>"  # the marks of a chat template

# one thought, whose opening may stand in the prompt, then one answer
format_good = all_of(
    occurs("<think>", 0, 1),
    occurs("</think>", 1, 1),
    occurs("<answer>", 1, 1),
    occurs("</answer>", 1, 1),
    in_order("</think>", "<answer>", "</answer>"),
)
clean = all_of(format_good, short_answer(10), free_of(_CHINESE), free_of(_CHAT))

r1_searcher_stage1 = total(scaled(searched(), 0.5), scaled(format_good, 0.5))

r1_searcher_stage1_code = total(
    scaled(cover_em, 2.0, -1.0), r1_searcher_stage1
)  # as published for Llama: 1 or -1 on top


def r1_searcher_stage2(penalty: float = 2.0) -> Reward:
    """F1 minus `penalty` for bad form: 2 for Qwen, 1 for Llama.

    Bad is also an answer of more than ten words, Chinese, and a chat template's mark.
    """
    return total(true_false_f1, scaled(clean, penalty, -penalty))
