"""Our critic as a judge of what any chat model writes: a critic of a small model reranks a large one's candidates."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import jax
import numpy as np

from jraggym.chat_model import Message
from jraggym.chats.local import Prompts, width
from jraggym.errors import InputError
from jraggym.model_folder import Model
from jraggym.objectives.forward import candidate_scores
from jraggym.text.batching import EMPTY_ROW, Row, collate
from jraggym.text.chat import chat_row

_scores = functools.partial(jax.jit, static_argnums=1)(candidate_scores)


class CriticScorer:
    """Scores candidate replies: those of the critic for the chat, the reply, and the end of the assistant's turn."""

    def __init__(self, model: Model, *, max_prompt: int = 4_096, truncate: bool = False, rows: int = 8):
        """Args as of `Local`. Raises InputError for a model that is no critic or has no chat template."""
        if model.kind != "critic":
            raise InputError("only a critic scores", got=model.kind, remedy="Name a critic.")
        self._model, self._rows = model, rows
        self._prompts = Prompts(model, max_prompt, truncate)

    def __call__(self, chats: Sequence[tuple[tuple[Message, ...], tuple[str, ...]]]) -> list[list[float]]:
        """The scores of each chat's candidates, higher is better.

        Raises InputError for a prompt that is too long, and for messages that the template refuses.
        """
        found: list[list[float]] = [[] for _ in chats]
        groups: dict[tuple[int, int, int], list[tuple[int, Row]]] = defaultdict(list)
        for i, (messages, texts) in enumerate(chats):
            if texts:
                row = self._row(messages, texts)
                prompt, action = row.sizes
                groups[width(prompt, 64), width(action, 16), width(len(texts), 1)].append((i, row))
        for (prompt, action, k), members in groups.items():
            for start in range(0, len(members), self._rows):
                part = members[start : start + self._rows]
                rows = [row for _, row in part] + [EMPTY_ROW] * (self._rows - len(part))
                pad = self._prompts.tokenizer.pad_id
                batch = collate(rows, prompt=prompt, action=action, candidates=k, pad=pad)
                scores = np.asarray(_scores(self._model.weights, self._model.config, batch))
                for (i, row), line in zip(part, scores, strict=False):
                    found[i] = line[: len(row.actions)].tolist()
        return found

    def _row(self, messages: tuple[Message, ...], texts: tuple[str, ...]) -> Row:
        row = chat_row(self._prompts.tokenizer, messages, texts)
        return replace(row, prompt=self._prompts.fit(row.prompt, row.sizes[1]))
