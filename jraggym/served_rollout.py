"""Rollouts of growing transcripts through a serving engine: the turns are drawn by its HTTP API, token by token.

server = Server("my-model", "http://localhost:8000/v1")
rollout = ServedRollout(server, TranscriptRules(SEARCH_R1, tokenizer), retriever, Sampling())
episodes, usage = rollout.run(examples, prompts, seed=0)

It is POST /completions with ids in and, by `return_token_ids`, ids and log-probabilities out: vLLM from 0.10.2 on, and
SGLang, which also needs Server(extra='{"no_stop_trim": true}'). The log-probabilities must be the policy's own, before
temperature and truncation: vLLM's default (--logprobs-mode raw_logprobs), and SGLang's with
SGLANG_RETURN_ORIGINAL_LOGPROB=1. They differ a little from the trainer's; `PolicyLoss(truncate=...)` weighs that.

The episodes are those of `jraggym.transcript_rollout`. What one draws depends on the seed, its name and the turn alone,
as far as the engine goes by the seed of a request.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait

import jax
import numpy as np

from jraggym.chats.answers import Fault, Hopeless, TokenAnswer, read_token_answer
from jraggym.chats.connection import Connection, Line, Server, Usage, seed_of
from jraggym.episodes import Retriever, episode_names
from jraggym.errors import InputError
from jraggym.sampling import Sampling
from jraggym.text.stop_strings import turn_end
from jraggym.transcript_episode import OpenEpisode, TranscriptEpisode, TranscriptRules, retrieve
from jraggym.types import Example


class ServedRollout:
    """Runs episodes of a tag protocol on a server; `server.concurrency` of them are under way at once."""

    def __init__(
        self,
        server: Server,
        rules: TranscriptRules,
        retriever: Retriever,
        sampling: Sampling,
    ):
        """`rules.ends` holds all ids that end a turn for the engine's model; the sampling's `candidates` and
        `max_tokens` are not used. Raises InputError for settings that cannot be."""
        if server.cache is not None:
            remedy = "Leave cache out: the weights behind a name change while they are trained."
            raise InputError("a rollout keeps no answers", got=f"cache {server.cache}", remedy=remedy)
        self._connection = Connection(server)
        self._rules, self._table = rules, rules.stop_table()
        self._retriever, self._encode = retriever, jax.jit(retriever.encode)
        self._fields = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,
            # An engine may take what a request leaves out from the model's generation_config.json.
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "stop": list(rules.protocol.stops) or None,
            "stop_token_ids": sorted(rules.ends) or None,
            "include_stop_str_in_output": True,
            "skip_special_tokens": False,
            "spaces_between_special_tokens": False,
            "logprobs": 1,
            "return_token_ids": True,
        }

    def run(
        self,
        examples: Sequence[Example],
        prompts: Sequence[Sequence[int]],
        seed: int,
        *,
        may_search: Sequence[bool] | None = None,
        retriever: Retriever | None = None,
        report: Callable[[int], None] | None = None,
    ) -> tuple[list[TranscriptEpisode], Usage]:
        """The episodes of `examples`, which begin with the ids of `prompts`, in order, and what they cost.

        A request that fails for good ends its episode, whose `error` says why; `usage.errors` counts them. A
        `retriever` with the same encoder replaces the rollout's own. `report` gets the number of finished episodes.
        Raises InputError, at once, for what no request survives: a wrong key, an unknown model, answers without ids.
        """
        self._rules.check(examples, prompts)
        names, allowed = episode_names(examples), may_search or [True] * len(examples)
        waiting = deque(
            OpenEpisode.start(self._rules, i, *parts)
            for i, parts in enumerate(zip(examples, prompts, allowed, strict=True))
        )
        done: dict[int, TranscriptEpisode] = {}
        under_way: dict[Future[TokenAnswer], OpenEpisode] = {}
        before = self._connection.usage
        with self._connection.open() as line:

            def go_on(episode: OpenEpisode) -> None:
                number = seed_of(seed, names[episode.number], episode.turns)
                ids = episode.transcript.ids.tolist()
                under_way[line.pool.submit(self._turn, line, ids, episode.room, number)] = episode

            while waiting or under_way:
                while waiting and len(under_way) < self._connection.server.concurrency:
                    go_on(waiting.popleft())
                ready = wait(under_way, return_when=FIRST_COMPLETED).done
                turns = [(under_way.pop(future), future) for future in ready]
                for episode, whole in self._read(turns, retriever or self._retriever):
                    if whole is None:
                        go_on(episode)
                    else:
                        done[episode.number] = whole
                if report is not None:
                    report(len(done))
        return [done[i] for i in range(len(examples))], self._connection.usage.since(before)

    def _read(
        self, turns: Sequence[tuple[OpenEpisode, Future[TokenAnswer]]], retriever: Retriever
    ) -> list[tuple[OpenEpisode, TranscriptEpisode | None]]:
        """How each episode goes on behind its turn: whole, or None."""
        found: list[tuple[OpenEpisode, TranscriptEpisode | None]] = []
        drawn: list[tuple[OpenEpisode, TokenAnswer]] = []
        for episode, future in turns:
            try:
                drawn.append((episode, future.result()))
            except Hopeless as fault:
                raise self._connection.refused(fault) from None
            except Fault as fault:
                self._connection.count(errors=1)
                found.append((episode, episode.stop(str(fault))))
        texts = self._rules.texts([answer.ids for _, answer in drawn])
        queries = [
            episode.act(answer.ids, np.array(answer.logprobs), text)
            for (episode, answer), text in zip(drawn, texts, strict=True)
        ]
        documents, error = retrieve(retriever, queries, self._embed(queries), self._rules.limits.timeout)
        found += [(episode, episode.observe(documents.get(i), error)) for i, (episode, _) in enumerate(drawn)]
        return found

    def _embed(self, queries: Sequence[str]) -> np.ndarray:
        """The vectors of the queries, f32 [b, D], in batches of a few sizes: each is compiled once."""
        if not any(queries):
            return np.zeros((len(queries), 0), np.float32)
        size = 1 << (len(queries) - 1).bit_length()
        ids, mask = self._retriever.tokenize([*queries, *[""] * (size - len(queries))])
        return np.asarray(self._encode(self._retriever.params, ids, mask))[: len(queries)]

    # --- one turn, in a thread

    def _turn(self, line: Line, prompt: list[int], room: int, seed: int) -> TokenAnswer:
        """The turn behind the ids of `prompt`; raises Fault."""
        body = self._connection.body(prompt=prompt, max_tokens=room, seed=seed, **self._fields)
        _, answer = self._connection.ask(line, "completions", body, len(prompt) + room, read_token_answer)
        return self._checked(prompt, room, answer)

    def _checked(self, prompt: list[int], room: int, answer: TokenAnswer) -> TokenAnswer:
        """The answer up to the token that ends the turn; raises Fault where it is no turn behind `prompt`.

        Behind that token there may be others, where an engine draws several at a time (speculative decoding).
        """
        if answer.prompt is not None and answer.prompt != tuple(prompt):
            raise Fault(f"the engine has read {len(answer.prompt)} ids that are not the prompt's", passing=False)
        size = self._rules.tokenizer.vocab_size
        if max(answer.ids) >= size:
            raise Fault(f"the engine drew id {max(answer.ids)}; the tokenizer has {size}", passing=False)
        count = turn_end(self._table, answer.ids)
        if count is None and not answer.cut:
            last = f"its last id is {answer.ids[-1]}"
            raise Fault(
                f"the engine stopped where no turn ends ({last}): `ends` lacks it, or it cuts stops off", passing=False
            )
        ids, logprobs = answer.ids[:count], answer.logprobs[:count]
        if len(ids) > room:
            raise Fault(f"the engine drew {len(ids)} tokens, more than {room}", passing=False)
        [spoken] = self._rules.texts([ids])
        if not _agree(spoken, answer.text, self._rules.protocol.stops):
            raise Fault(f"ids and text differ: {spoken[:80]!r} and {answer.text[:80]!r}", passing=False)
        return TokenAnswer(
            ids, logprobs, spoken, count is None, answer.prompt, answer.prompt_tokens, answer.completion_tokens
        )


def _agree(spoken: str, text: str, stops: Sequence[str]) -> bool:
    """Whether an engine's text is that of the ids: up to a stop string, and an end token's name may stand behind.

    Spaces do not count, since engines differ in them, and neither does half a character at the end.
    """
    ends = [spoken.find(stop) + len(stop) for stop in stops if stop in spoken]
    spoken, text = ("".join(t.split()) for t in (spoken[: min(ends, default=None)].rstrip("\ufffd"), text))
    return text.startswith(spoken)
