"""A chat model over any OpenAI-compatible server: vLLM, SGLang, api.openai.com ...

chat = Endpoint(Server("gpt-4o-mini", key_variable="OPENAI_API_KEY", cache=Path("runs/answers.sqlite")))
replies = chat([Request((Message("user", "Who wrote Dune?"),))])

Where a batch is killed, what was answered is in the cache, and the same call later pays for the rest alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, wait
from dataclasses import dataclass
from typing import Any

from jraggym.chat_model import Reply, Request
from jraggym.chats.answer_cache import AnswerCache
from jraggym.chats.answers import Answer, Fault, Hopeless, read_answer
from jraggym.chats.connection import Connection, Line, Server, Usage, seed_of

_TOKEN = 4  # characters of one, to reserve tokens before the server has counted them


@dataclass(frozen=True)
class _Call:
    """What the threads of one call share."""

    line: Line
    cache: AnswerCache


class Endpoint:
    """The `ChatModel` of a server.

    Greedy candidates are asked for once and repeated. A reply from the cache says what it cost when it was paid for;
    `usage` counts what this object has paid itself.
    """

    def __init__(self, server: Server):
        """Raises InputError for settings that cannot be, and where the variable of the key is not set."""
        self.server = server
        self._connection = Connection(server)

    @property
    def usage(self) -> Usage:
        """All calls so far."""
        return self._connection.usage

    def __call__(self, requests: Sequence[Request]) -> list[Reply]:
        """Raises InputError, at once, for what no request would survive: a wrong key, an unknown model, no money."""
        unique = tuple(dict.fromkeys(requests))
        with AnswerCache(self.server.cache) as cache, self._connection.open() as line:
            futures = [line.pool.submit(self._reply, _Call(line, cache), request) for request in unique]
            wait(futures, return_when=FIRST_EXCEPTION)
            failed = next((f for f in futures if f.done() and f.exception()), None)
            replies = [(failed or future).result() for future in futures]
        known = dict(zip(unique, replies, strict=True))
        return [known[request] for request in requests]

    def _reply(self, call: _Call, request: Request) -> Reply:
        wanted = 1 if request.temperature == 0.0 else request.candidates  # greedy ones are all alike
        answers: list[Answer] = []
        error = None
        try:
            if request.candidates < 1:
                raise Fault("a request is for at least one candidate", passing=False)
            try:
                answers.append(self._answer(call, request, wanted, request.seed))
            except Fault as fault:
                if wanted == 1 or fault.status not in (400, 422):  # else it may be `n` that the server does not take
                    raise
            while (have := sum(len(answer.completions) for answer in answers)) < wanted:
                answers.append(self._answer(call, request, 1, seed_of(request.seed, have)))
        except Hopeless as fault:
            raise self._connection.refused(fault) from None
        except Fault as fault:
            error = str(fault)
            self._connection.count(errors=1)
        prompt = sum(answer.prompt_tokens for answer in answers)
        cost = sum(map(self._connection.price, answers))
        if error is not None:
            return Reply((), prompt, cost, error)
        completions = [completion for answer in answers for completion in answer.completions][:wanted]
        return Reply(tuple(completions * (request.candidates // wanted)), prompt, cost)

    def _answer(self, call: _Call, request: Request, n: int, seed: int) -> Answer:
        """One answer, from the cache or from the server; raises Fault."""
        body = self._body(request, n, seed)
        question = {"base_url": self.server.base_url, "body": body}
        if (kept := call.cache.get(question)) is not None:
            self._connection.count(cached=1)
            return read_answer(kept)
        reserve = sum(len(message.content) for message in request.messages) // _TOKEN + n * request.max_tokens
        text, answer = self._connection.ask(call.line, "chat/completions", body, reserve, read_answer)
        call.cache.put(question, text)
        return answer

    def _body(self, request: Request, n: int, seed: int) -> dict[str, Any]:
        fields = {
            "messages": [{"role": message.role, "content": message.content} for message in request.messages],
            "temperature": request.temperature,
            self.server.length_field: request.max_tokens,
            "seed": seed,
            "n": n if n > 1 else None,
            "logprobs": self.server.logprobs or None,
        }
        return self._connection.body(**fields)
