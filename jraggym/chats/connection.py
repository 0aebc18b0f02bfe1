"""Requests to an OpenAI-compatible server: in threads, paced, retried, and counted in tokens and dollars.

Threads and not asyncio, so that it runs in a notebook, whose event loop is taken.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import httpx2
import tenacity

from jraggym.chats.answers import LIMITED, Fault, Hopeless, plain, read_fault
from jraggym.chats.pace import Pace
from jraggym.errors import InputError
from jraggym.preemption import stop_if_asked


class Paid(Protocol):
    """What a good answer costs."""

    @property
    def prompt_tokens(self) -> int: ...
    @property
    def completion_tokens(self) -> int: ...


Read = TypeVar("Read", bound=Paid)


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

    def since(self, before: Usage) -> Usage:
        """What has come to `before`."""
        now, then = dataclasses.astuple(self), dataclasses.astuple(before)
        return Usage(*(a - b for a, b in zip(now, then, strict=True)))


@dataclass(frozen=True)
class Line:
    """An open connection: what the threads of one call share."""

    client: httpx2.Client
    pool: ThreadPoolExecutor
    stopped: threading.Event


class Connection:
    """The way to a server, with its rate limits and the count of what was paid."""

    def __init__(self, server: Server):
        """Raises InputError for settings that cannot be, and where the variable of the key is not set."""
        self.server = server
        self._key = _key(server.key_variable)
        self._extra = _checked(server)
        self._requests, self._tokens = Pace(server.requests_per_minute), Pace(server.tokens_per_minute)
        self._usage, self._lock = Usage(), threading.Lock()

    @property
    def usage(self) -> Usage:
        """All requests so far."""
        with self._lock:
            return dataclasses.replace(self._usage)

    @contextmanager
    def open(self) -> Iterator[Line]:
        """A line of `concurrency` threads; where its body raises, nothing new is begun."""
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        limits = httpx2.Limits(max_connections=self.server.concurrency)
        with (
            httpx2.Client(headers=headers, timeout=self.server.timeout, limits=limits) as client,
            ThreadPoolExecutor(self.server.concurrency) as pool,
        ):
            line = Line(client, pool, threading.Event())
            try:
                yield line
            except BaseException:  # also a keyboard interrupt
                line.stopped.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def ask(
        self, line: Line, path: str, body: dict[str, Any], reserve: int, read: Callable[[str], Read]
    ) -> tuple[str, Read]:
        """The text of an answer, and what `read` makes of it; called in a thread of the line.

        Args: reserve: the tokens that it may cost, for the rate limit. Raises Fault, as `read` may.
        """
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(lambda error: isinstance(error, Fault) and error.passing),
            stop=tenacity.stop_after_attempt(self.server.attempts),
            wait=self._wait,
            sleep=tenacity.sleep_using_event(line.stopped),
            before_sleep=lambda state: self.count(retries=1),
            reraise=True,
        )
        text, answer = retrying(self._attempt, line, path, json.dumps(body).encode(), reserve, read)
        prompt, completion = answer.prompt_tokens, answer.completion_tokens
        self.count(answers=1, prompt_tokens=prompt, completion_tokens=completion, cost=self.price(answer))
        return text, answer

    def body(self, **fields: Any) -> dict[str, Any]:
        """A request's fields, those of the server's `extra` over them; None takes a field out."""
        every = {"model": self.server.model, **fields, **self._extra}
        return {name: value for name, value in every.items() if value is not None}

    def price(self, answer: Paid) -> float:
        """US dollars."""
        server = self.server
        prices = server.prompt_price * answer.prompt_tokens + server.completion_price * answer.completion_tokens
        return prices / 1e6

    def count(self, **more: float) -> None:
        """Adds to the fields of `usage`."""
        with self._lock:
            for name, value in more.items():
                setattr(self._usage, name, getattr(self._usage, name) + value)

    def refused(self, fault: Hopeless) -> InputError:
        """The error for a fault of all requests alike."""
        what = f"{self.server.base_url} refuses all requests to {self.server.model}"
        return InputError(what, got=fault, remedy=fault.remedy)

    def _attempt(
        self, line: Line, path: str, body: bytes, reserve: int, read: Callable[[str], Read]
    ) -> tuple[str, Read]:
        """One request in its turn; raises Fault. A job that is asked to end pays for what is under way, and no more."""
        stop_if_asked()
        if line.stopped.wait(max(self._requests.take(1), self._tokens.take(reserve))):
            raise Fault("the call was stopped", passing=False)
        try:
            status, headers, text = self._post(line.client, path, body)
        except httpx2.RequestError as error:
            raise Fault(f"no answer: {type(error).__name__} {plain(str(error))}", passing=True) from error
        text = text.replace(self._key, "[the key]") if self._key else text
        if status == 200:
            answer = read(text)
            self._tokens.give_back(reserve - answer.prompt_tokens - answer.completion_tokens)
            return text, answer
        fault = read_fault(status, headers, text)
        if fault.passing and fault.after > self.server.patience:
            raise Fault(f"{fault} (it asks to wait {fault.after:.0f} s)", passing=False, status=status)
        if status == LIMITED:
            self._requests.hold(fault.after)  # the limit is the key's: the other threads wait as well
        raise fault

    def _post(self, client: httpx2.Client, path: str, body: bytes) -> tuple[int, httpx2.Headers, str]:
        """Status, headers and text. The timeout is for all of it: some servers send blanks while they work."""
        end = time.monotonic() + self.server.timeout
        url, headers = f"{self.server.base_url.rstrip('/')}/{path}", {"Content-Type": "application/json"}
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


def seed_of(*parts: Any) -> int:
    """A seed below 2**31 that the parts decide alone; neighbouring parts have unlike ones."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:4]) >> 1


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
