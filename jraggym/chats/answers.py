"""The strict reading of what an OpenAI-compatible server answers: a completion, or a fault.

The format is that of POST /chat/completions (platform.openai.com/docs/api-reference/chat), and for token ids that of
POST /completions with `return_token_ids`, in which vLLM (from 0.10.2 on) and SGLang give them.
"""

from __future__ import annotations

import email.utils
import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from jraggym.chat_model import Completion

PASSING = (408, 409, 425, 429)  # beside all of 500 and above
LIMITED = 429
_ROUNDING = 1e-4  # a log-softmax in float32 may end a little above 0
_WORDS = 300  # characters of a server's own words that an error repeats


class Fault(Exception):
    """A request that failed. `passing`: it may do better later, `after` so many seconds; `status`: of HTTP, or 0."""

    def __init__(self, message: str, *, passing: bool, status: int = 0, after: float = 0.0):
        super().__init__(message)
        self.passing, self.status, self.after = passing, status, after


class Hopeless(Fault):
    """A fault of all requests alike: a wrong key, an unknown model, an account without money."""

    remedy = "Check base_url, model, and the key in the environment variable key_variable."


class NoTokens(Hopeless):
    """Answers of text alone."""

    remedy = "Use an engine that takes return_token_ids and logprobs: vLLM from 0.10.2 on, or SGLang."


@dataclass(frozen=True, slots=True)
class Answer:
    """The completions of one answer and the tokens that were paid for."""

    completions: tuple[Completion, ...]
    prompt_tokens: int
    completion_tokens: int


def read_answer(text: str) -> Answer:
    """Reads the body of a good answer.

    A completion's tokens are counted where its log-probabilities came along; else each has its share of all tokens by
    the length of its text. Raises Fault (passing) when the text is no JSON or lacks a field.
    """
    try:
        values = json.loads(text)
        usage = values["usage"]
        prompt, total = _count(usage["prompt_tokens"]), _count(usage["completion_tokens"])
        found = [_completion(choice) for choice in values["choices"]]
        if not found:
            raise ValueError("no choice")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _unreadable(text, error) from error
    shares = _shares(total, [len(completion.text) for completion in found])
    return Answer(
        tuple(
            c if c.tokens else Completion(c.text, share, c.logprob, c.cut)
            for c, share in zip(found, shares, strict=True)
        ),
        prompt,
        total,
    )


@dataclass(frozen=True, slots=True)
class TokenAnswer:
    """The one completion of an answer as the ids that were drawn, and the tokens that were paid for."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]  # of each id, in nats
    text: str
    cut: bool  # by the limit of tokens
    prompt: tuple[int, ...] | None  # the ids that the engine has read, where it says so
    prompt_tokens: int
    completion_tokens: int


def read_token_answer(text: str) -> TokenAnswer:
    """Reads the body of a good answer with token ids and log-probabilities.

    Raises NoTokens where there are none of either, and Fault (passing) where the answer is damaged.
    """
    try:
        values = json.loads(text)
        usage, [choice] = values["usage"], values["choices"]
        ids, logprobs, reason = choice.get("token_ids"), choice.get("logprobs"), choice["finish_reason"]
        if ids is None or logprobs is None:
            missing = "token ids (choices[].token_ids)" if ids is None else "log-probabilities (choices[].logprobs)"
            raise NoTokens(f"the answers have no {missing}, and none are made from text", passing=False)
        prompt = choice.get("prompt_token_ids")
        found = TokenAnswer(
            tuple(map(_count, ids)),
            tuple(map(float, logprobs["token_logprobs"])),
            choice["text"],
            reason == "length",
            None if prompt is None else tuple(map(_count, prompt)),
            _count(usage["prompt_tokens"]),
            _count(usage["completion_tokens"]),
        )
        if not isinstance(found.text, str) or reason not in ("stop", "length"):
            raise ValueError(f"finish_reason {reason!r}")
        if not ids or len(ids) != len(found.logprobs) or not all(-math.inf < x <= _ROUNDING for x in found.logprobs):
            raise ValueError(f"{len(ids)} ids with log-probabilities {found.logprobs[:4]} ...")
        return found
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _unreadable(text, error) from error


def _unreadable(text: str, error: Exception) -> Fault:
    message = f"the answer cannot be read ({type(error).__name__} {error}): {plain(text) or 'it is empty'}"
    return Fault(message, passing=True)


def _completion(choice: Mapping[str, Any]) -> Completion:
    message, reason = choice["message"], choice["finish_reason"]
    content = message["content"]
    if content is None:
        # A refusal has words of its own; a model that is cut while it thinks has none yet.
        content = message.get("refusal") or ("" if reason == "length" else None)
    if not isinstance(content, str) or not isinstance(reason, str):
        raise TypeError(f"content {content!r} with finish_reason {reason!r}")
    steps = (choice.get("logprobs") or {}).get("content") or ()
    logprob = math.fsum(float(step["logprob"]) for step in steps) if steps else None
    return Completion(content, len(steps), logprob, reason == "length")


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise TypeError(f"{value!r} is no count")
    return value


def _shares(total: int, lengths: list[int]) -> list[int]:
    """`total` split in proportion to the lengths, with nothing lost to rounding."""
    ends, done, whole = [0], 0, sum(lengths) + len(lengths)
    for length in lengths:
        done += length + 1  # an empty text has an end of turn, too
        ends.append(round(total * done / whole))
    return [b - a for a, b in pairwise(ends)]


def read_fault(status: int, headers: Mapping[str, str], text: str) -> Fault:
    """What an answer that is not 200 says, in the server's own words."""
    words, code = text, ""
    try:
        error = json.loads(text)["error"]
        words, code = (error, "") if isinstance(error, str) else (str(error["message"]), str(error.get("code")))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass  # then the text itself is what the server says
    message = f"the server answered {status}: {plain(words) or 'nothing'}"
    if status in (401, 402, 404) or code == "insufficient_quota":
        return Hopeless(message, passing=False, status=status)
    after = _seconds(headers.get("retry-after", ""))
    return Fault(message, passing=status in PASSING or status >= 500, status=status, after=after)


def _seconds(retry_after: str) -> float:
    """The seconds of a Retry-After header: a number, or a date (RFC 9110, 10.2.3); 0 for what is neither."""
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time()
        except (ValueError, OverflowError):
            return 0.0
    return max(0.0, seconds) if math.isfinite(seconds) else 0.0


def plain(text: str) -> str:
    """The beginning of a text on one line, without control characters."""
    kept = "".join(c if c.isprintable() else " " for c in text[: 4 * _WORDS])
    line = " ".join(kept.split())
    return line if len(line) <= _WORDS else f"{line[:_WORDS]} ..."
