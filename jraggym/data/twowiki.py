"""2WikiMultihopQA (Ho et al., COLING 2020): multi-hop questions in HotpotQA's layout, with evidence triples."""

from __future__ import annotations

from pathlib import Path

from jraggym.data.hotpotqa import LAYOUT, read_layout
from jraggym.data.questions import QuestionSet


def read_official(path: str | Path) -> QuestionSet:
    """Reads the official json; the corpus is the union of all paragraphs, the first one of each title.

    Raises:
      InputError: naming file and record, for a file that is no such json, a missing field or one of another
        type, or a question without gold answer.
    """
    return read_layout(path, LAYOUT | {"evidences": list}, "2WikiMultihopQA")
