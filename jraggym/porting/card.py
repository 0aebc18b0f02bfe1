"""The model card of an exported folder: what it is, how to load it, and how it came to be."""

from __future__ import annotations

import importlib.metadata
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

_HUB = re.compile(r"[\w.-]+/[\w.-]+")
_PACKAGES = ("jax", "flax", "optax", "transformers")
_CARD = """\
---
library_name: {{ library }}
tags: [jraggym, search-agent{{ ", process-reward-model" if kind == "critic" }}]
{%- if base %}
base_model: {{ base }}
{%- endif %}
---

# {{ title }}

{{ what }}

```python
{{ code }}
```

## How it was made

| what | value |
|---|---|
{%- for name, value in facts.items() %}
| {{ name }} | {{ value }} |
{%- endfor %}
"""
_WHAT = {
    "actor": "The policy of a search agent: it writes one tagged action, a search or an answer, for each prompt.",
    "critic": "A process reward model: the score of a prompt followed by one action, read at its last token.",
    "adapters": "LoRA adapters of a search agent's policy.",
    "critic adapters": "LoRA adapters and score head of a process reward model.",
}
_CODE = {
    "actor": "AutoModelForCausalLM.from_pretrained(folder)",
    "critic": "AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)",
    "adapters": "PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)",
    "critic adapters": "PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(base), folder)",
}


def write_card(folder: Path, kind: str, about: Mapping[str, Any], *, base: str = "") -> None:
    """Writes `folder`/README.md; `about` holds JSON values, of which short ones become rows of the table."""
    versions = {name: importlib.metadata.version(name) for name in ("jraggym", *_PACKAGES)}
    facts = {**about, "made with": ", ".join(f"{name} {version}" for name, version in versions.items())}
    shown = {name: _plain(value) for name, value in facts.items()}
    card = jinja2.Template(_CARD, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    library = "peft" if "adapters" in kind else "transformers"
    text = card.render(
        kind=kind,
        library=library,
        base=base if _HUB.fullmatch(base) else "",  # the hub takes no local path
        title=f"A jraggym {kind}",
        what=_WHAT[kind],
        code=_CODE[kind],
        facts={name: value for name, value in shown.items() if len(value) <= 200},
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def _plain(value: Any) -> str:
    """One line that cannot leave its cell."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return " ".join(text.split()).replace("|", "\\|").replace("`", "'")
