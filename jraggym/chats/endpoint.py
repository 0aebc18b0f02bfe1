"""A chat model over any OpenAI-compatible server: vLLM, SGLang, api.openai.com ...

chat = Endpoint(Server("gpt-4o-mini", key_variable="OPENAI_API_KEY", cache=Path("runs/answers.sqlite")))
replies = chat([Request((Message("user", "Who wrote Dune?"),))])

Threads and not asyncio, so that it runs in a notebook, whose event loop is taken. Where a batch is killed, what was
answered is in the cache, and the same call later pays for the rest alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import httpx2
import tenacity

from jraggym.chat_model import Reply, Request
from jraggym.chats.answer_cache import AnswerCache
from jraggym.chats.answers import LIMITED, Answer, Fault, Hopeless, plain, read_answer, read_fault
from jraggym.chats.pace import Pace
from jraggym.errors import InputError

_TOKEN = 4  # characters of one, to reserve tokens before the server has counted them


@dataclass(frozen=True)
class Server:
    """A model behind an OpenAI-compatible server: where it is, what it costs, and how hard it may be pressed."""

    model: str
    base_url: str = "https://api.openai.com/v1"
    key_variable: str | None = None  # the environment variable that holds the API key; none: no key is sent
    prompt_price: float = 0.0  # US dollars per million tokens
    completion_price: float = 0.0  # US dollars per million tokens
    cache: Path | None = None  # the file that keeps all answers
    concurrency: int = 16  # requests under way at once
    requests_per_minute: float = math.inf
    tokens_per_minute: float = math.inf  # of prompts and completions
    timeout: float = 120.0  # seconds for a whole answer
    attempts: int = 6
    backoff: float = 1.0  # seconds before the second attempt; doubled before each further one
    patience: float = 120.0  # seconds: the longest wait between attempts, also where the server asks for more
    logprobs: bool = False  # ask for log-probabilities; not every server gives them
    length_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"  # the second for reasoning models
    extra: str = "{}"  # a JSON object of further fields of each request; null takes a field out


@dataclass
class Usage:
    """What was asked of a server: answers that were paid for and those from the cache, tokens, US dollars."""

    answers: int = 0
    cached: int = 0
    retries: int = 0
    errors: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0


@dataclass(frozen=True)
class _Call:
    """What the threads of one call share."""

    client: httpx2.Client
    cache: AnswerCache
    stopped: threading.Event


class Endpoint:
    """The `ChatModel` of a server.

    Greedy candidates are asked for once and repeated. A reply from the cache says what it cost when it was paid for;
    `usage` counts what this object has paid itself.
    """

    def __init__(self, server: Server):
        """Raises InputError for settings that cannot be, and where the variable of the key is not set."""
        self.server = server
        self._key = _key(server.key_variable)
        self._extra = _checked(server)
        self._requests, self._tokens = Pace(server.requests_per_minute), Pace(server.tokens_per_minute)
        self._usage, self._lock = Usage(), threading.Lock()

    @property
    def usage(self) -> Usage:
        """All calls so far."""
        with self._lock:
            return dataclasses.replace(self._usage)

    def __call__(self, requests: Sequence[Request]) -> list[Reply]:
        """Raises InputError, at once, for what no request would survive: a wrong key, an unknown model, no money."""
        server, unique = self.server, tuple(dict.fromkeys(requests))
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        limits = httpx2.Limits(max_connections=server.concurrency)
        with (
            AnswerCache(server.cache) as cache,
            httpx2.Client(headers=headers, timeout=server.timeout, limits=limits) as client,
            ThreadPoolExecutor(server.concurrency) as pool,
        ):
            call = _Call(client, cache, threading.Event())
            futures = [pool.submit(self._reply, call, request) for request in unique]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
                failed = next((f for f in futures if f.done() and f.exception()), None)
                replies = [(failed or future).result() for future in futures]
            except BaseException:  # also a keyboard interrupt: nothing new is begun, and what is under way is kept
                call.stopped.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
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
                answers.append(self._answer(call, request, 1, _seed(request.seed, have)))
        except Hopeless as fault:
            remedy = "Check base_url, model, and the key in the environment variable key_variable."
            raise InputError(
                f"{self.server.base_url} refuses all requests to {self.server.model}", got=fault, remedy=remedy
            ) from None
        except Fault as fault:
            error = str(fault)
            self._count(errors=1)
        prompt = sum(answer.prompt_tokens for answer in answers)
        cost = sum(map(self._price, answers))
        if error is not None:
            return Reply((), prompt, cost, error)
        completions = [completion for answer in answers for completion in answer.completions][:wanted]
        return Reply(tuple(completions * (request.candidates // wanted)), prompt, cost)

    def _answer(self, call: _Call, request: Request, n: int, seed: int) -> Answer:
        """One answer, from the cache or from the server; raises Fault."""
        body = self._body(request, n, seed)
        question = {"base_url": self.server.base_url, "body": body}
        if (kept := call.cache.get(question)) is not None:
            self._count(cached=1)
            return read_answer(kept)
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(lambda error: isinstance(error, Fault) and error.passing),
            stop=tenacity.stop_after_attempt(self.server.attempts),
            wait=self._wait,
            sleep=tenacity.sleep_using_event(call.stopped),
            before_sleep=lambda state: self._count(retries=1),
            reraise=True,
        )
        text, answer = retrying(self._attempt, call, json.dumps(body).encode(), self._reserve(request, n))
        call.cache.put(question, text)
        self._count(
            answers=1,
            prompt_tokens=answer.prompt_tokens,
            completion_tokens=answer.completion_tokens,
            cost=self._price(answer),
        )
        return answer

    def _attempt(self, call: _Call, body: bytes, reserved: int) -> tuple[str, Answer]:
        """One request in its turn; raises Fault."""
        if call.stopped.wait(max(self._requests.take(1), self._tokens.take(reserved))):
            raise Fault("the call was stopped", passing=False)
        try:
            status, headers, text = self._post(call.client, body)
        except httpx2.RequestError as error:
            raise Fault(f"no answer: {type(error).__name__} {plain(str(error))}", passing=True) from error
        text = text.replace(self._key, "[the key]") if self._key else text
        if status == 200:
            answer = read_answer(text)
            self._tokens.give_back(reserved - answer.prompt_tokens - answer.completion_tokens)
            return text, answer
        fault = read_fault(status, headers, text)
        if fault.passing and fault.after > self.server.patience:
            raise Fault(f"{fault} (it asks to wait {fault.after:.0f} s)", passing=False, status=status)
        if status == LIMITED:
            self._requests.hold(fault.after)  # the limit is the key's: the other threads wait as well
        raise fault

    def _post(self, client: httpx2.Client, body: bytes) -> tuple[int, httpx2.Headers, str]:
        """Status, headers and text. The timeout is for all of it: some servers send blanks while they work."""
        end = time.monotonic() + self.server.timeout
        url, headers = f"{self.server.base_url.rstrip('/')}/chat/completions", {"Content-Type": "application/json"}
        with client.stream("POST", url, content=body, headers=headers) as response:
            parts = []
            for part in response.iter_bytes():
                parts.append(part)
                if time.monotonic() > end:
                    raise httpx2.ReadTimeout(f"not whole after {self.server.timeout} s")
            return response.status_code, response.headers, b"".join(parts).decode("utf-8", "replace")

    def _wait(self, state: tenacity.RetryCallState) -> float:
        """Seconds before the next attempt: doubled each time, with jitter, and no less than the server asks for."""
        backoff = tenacity.wait_random_exponential(self.server.backoff, self.server.patience, min=self.server.backoff)
        error = state.outcome.exception() if state.outcome else None
        return max(backoff(state), error.after if isinstance(error, Fault) else 0.0)

    def _body(self, request: Request, n: int, seed: int) -> dict[str, Any]:
        body = {
            "model": self.server.model,
            "messages": [{"role": message.role, "content": message.content} for message in request.messages],
            "temperature": request.temperature,
            self.server.length_field: request.max_tokens,
            "seed": seed,
            "n": n if n > 1 else None,
            "logprobs": self.server.logprobs or None,
            **self._extra,
        }
        return {name: value for name, value in body.items() if value is not None}

    @staticmethod
    def _reserve(request: Request, n: int) -> int:
        return sum(len(message.content) for message in request.messages) // _TOKEN + n * request.max_tokens

    def _price(self, answer: Answer) -> float:
        server = self.server
        prices = server.prompt_price * answer.prompt_tokens + server.completion_price * answer.completion_tokens
        return prices / 1e6

    def _count(self, **more: float) -> None:
        with self._lock:
            for name, value in more.items():
                setattr(self._usage, name, getattr(self._usage, name) + value)


def _seed(seed: int, number: int) -> int:
    """Another seed for each completion that is asked for by itself, unlike those of neighbouring requests."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{number}".encode()).digest()[:4]) >> 1


def _key(variable: str | None) -> str:
    """The API key, which no message ever shows."""
    if variable is None:
        return ""
    key = os.environ.get(variable, "").strip()
    if not key or not key.isascii() or not key.isprintable():
        got = "letters that no key has" if key else "nothing"
        raise InputError(f"no API key in the environment variable {variable}", got=got, remedy=f"Set {variable}.")
    return key


def _checked(server: Server) -> dict[str, Any]:
    """The further fields of requests; raises InputError for settings that cannot be."""
    try:
        address = httpx2.URL(server.base_url)
    except httpx2.InvalidURL as error:
        raise InputError("base_url is no address", got=error, remedy="Write http://host:port/v1.") from error
    if address.scheme not in ("http", "https") or not address.host:
        raise InputError("base_url is no address", got=repr(server.base_url), remedy="Write http://host:port/v1.")
    if address.userinfo:
        raise InputError("base_url holds a password", got=address.host, remedy="Use key_variable.")
    least = {"concurrency": 1, "attempts": 1, "prompt_price": 0, "completion_price": 0, "backoff": 0, "patience": 0}
    for name, low in least.items():
        if not getattr(server, name) >= low:
            raise InputError(f"{name} is too low", got=getattr(server, name), remedy=f"Use {low} or more.")
    if not server.timeout > 0:
        raise InputError("the timeout must be positive", got=server.timeout, remedy="Give seconds.")
    try:
        extra = json.loads(server.extra)
    except ValueError as error:
        raise InputError("extra is no JSON", got=repr(server.extra), remedy='Write {"top_p": 0.9}.') from error
    if not isinstance(extra, dict):
        raise InputError("extra is no JSON object", got=repr(server.extra), remedy='Write {"top_p": 0.9}.')
    return extra
