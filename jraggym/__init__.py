"""jraggym: RAG-Gym in JAX. Search agents trained on process rewards, from a laptop CPU to a TPU pod."""

from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "make":  # imported when asked for, so that `import jraggym` stays light
        from jraggym.gym import make

        return make
    raise AttributeError(f"module 'jraggym' has no attribute {name!r}")
