"""Digests: what a frozen model makes of a search's documents, for the agents that read no documents themselves.

A digest depends on the question, the query and the documents alone, so each is made once. The usage of the call that
made it is kept beside it: an episode is charged as though it ran alone, whatever ran before it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jraggym.agents.prompts import DOCUMENTS, documents_text, neutralise, one_line
from jraggym.chat_model import ChatModel, Message, Reply, Request
from jraggym.errors import InputError
from jraggym.types import Document

Asked = tuple[str, str, tuple[Document, ...]]  # question, query, documents

SYSTEM = (
    "Somebody is looking for the answer to a question and has searched for one thing that it takes. Tell in one to "
    "three sentences what the documents say about the query. Use nothing but the documents, not even what you know for "
    "certain, and do not try to answer the question itself. Name names, dates and numbers exactly. If the documents do "
    "not tell, say that they do not."
)


@dataclass(frozen=True, slots=True)
class Digest:
    """A digest, or an `error`, and what it cost (tokens; US dollars)."""

    text: str | None
    prompt_tokens: int = 0
    tokens: int = 0
    cost: float = 0.0
    error: str | None = None


class Summariser:
    """Digests searches with a frozen chat model, all that are new in one batch; what fails is asked again next time.

    Digests are kept in memory and, where there is a `path`, in that file of JSON lines, which outlives a kill. `name`
    tells models apart that share a file.
    """

    def __init__(self, model: ChatModel, name: str = "", *, max_tokens: int = 512, path: Path | None = None):
        """Raises InputError where the file is no file of digests."""
        self._model, self._name, self._max_tokens, self._path = model, name, max_tokens, path
        self._lock = threading.Lock()
        self._kept = {} if path is None else _load(path)

    def __call__(self, asked: Sequence[Asked]) -> list[Digest]:
        """One digest for each search, in their order."""
        requests = [Request(messages(*item), max_tokens=self._max_tokens) for item in asked]
        keys = [self._key(request, item) for request, item in zip(requests, asked, strict=True)]
        with self._lock:  # a second caller waits, and finds what the first one made
            new = {key: r for key, r in zip(keys, requests, strict=True) if key not in self._kept}
            replies = self._model(list(new.values())) if new else []
            made = {key: _digest(reply) for key, reply in zip(new, replies, strict=True)}
            self._keep({key: digest for key, digest in made.items() if digest.error is None})
            return [self._kept[key] if key in self._kept else made[key] for key in keys]

    def _key(self, request: Request, item: Asked) -> str:
        texts = [(message.role, message.content) for message in request.messages]
        parts = (self._name, request.max_tokens, texts, [document.id for document in item[2]])
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def _keep(self, made: dict[str, Digest]) -> None:
        self._kept.update(made)
        if self._path is not None and made:
            lines = [json.dumps({"key": key, **dataclasses.asdict(digest)}) + "\n" for key, digest in made.items()]
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(lines)


def messages(question: str, query: str, documents: Sequence[Document]) -> tuple[Message, ...]:
    """The prompt of a digest."""
    text = (
        f"### {DOCUMENTS}\n{documents_text(documents)}\n\n"
        f"### Question\n{neutralise(question.strip())}\n\n### Query\n{one_line(query)}"
    )
    return Message("system", SYSTEM), Message("user", text)


def _digest(reply: Reply) -> Digest:
    error = reply.error
    text = reply.completions[0].text.strip() if error is None and reply.completions else ""
    tokens = sum(completion.tokens for completion in reply.completions)
    if error is None and not text:
        error = "an empty digest"
    return Digest(text or None, reply.prompt_tokens, tokens, reply.cost, error)


def _load(path: Path) -> dict[str, Digest]:
    """The kept digests; a last line that a kill has cut off is taken out of the file."""
    if not path.exists():
        return {}
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with path.open("rb+") as file:
            file.truncate(len(whole))
    kept = {}
    for number, line in enumerate(whole.decode("utf-8", "replace").splitlines(), 1):
        try:
            record = json.loads(line)
            key = record.pop("key")
            kept[key] = Digest(**record)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(
                f"line {number} of {path} is no digest", got=line[:80], remedy="Name a file of digests, or a new one."
            ) from error
    return kept
