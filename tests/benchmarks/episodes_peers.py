"""Whole transcripts through Hugging Face `generate` and google-tunix's vanilla sampler, for `episodes.py`."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

Ids = list[int]
Generate = Callable[[Sequence[Ids], Sequence[int]], list[Ids]]  # transcripts, tokens of each -> what was drawn


def cut(rows: Sequence[Sequence[int]], limits: Sequence[int], stops: Sequence[int]) -> list[Ids]:
    """Each row up to and with its first stop, and at most its limit."""
    kept = [list(map(int, row[:limit])) for row, limit in zip(rows, limits, strict=True)]
    return [row[: next((i + 1 for i, t in enumerate(row) if t in stops), len(row))] for row in kept]


class Limits(StoppingCriteria):
    """Ends each row at its own length; with the stop tokens in `eos_token_id` it is all that a turn needs."""

    def __init__(self, width: int, limits: Sequence[int]):
        self._ends = width + torch.tensor(limits)

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        return input_ids.shape[1] >= self._ends


def hf_generate(case: Any, folder: Path, temperature: float) -> Generate:
    """`generate` as it is: sdpa, its growing cache, and stop tokens by their ids, which is faster than by strings."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    sampled = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    options = sampled if temperature else {"do_sample": False}
    pad, stops = case.tokenizer.pad_id, case.stops

    @torch.inference_mode()
    def generate(transcripts: Sequence[Ids], limits: Sequence[int]) -> list[Ids]:
        width = max(map(len, transcripts))
        ids = torch.tensor([[pad] * (width - len(t)) + t for t in transcripts])
        mask = torch.tensor([[0] * (width - len(t)) + [1] * len(t) for t in transcripts])
        found = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=max(limits),
            eos_token_id=stops,
            pad_token_id=pad,
            stopping_criteria=StoppingCriteriaList([Limits(width, limits)]),
            **options,
        )
        return cut(found[:, width:].tolist(), limits, stops)

    return generate


class _Numbers:
    """A tokenizer whose text is ids as numbers, since the sampler takes text."""

    def __init__(self, pad: int, end: int):
        self._pad, self._end = pad, end

    def encode(self, text: str, **_: Any) -> Ids:
        return [int(number) for number in text.split()]

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return ""

    def bos_id(self) -> int:
        return -1

    def eos_id(self) -> int:
        return self._end

    def pad_id(self) -> int:
        return self._pad


def tunix_generate(case: Any, folder: Path, temperature: float, step: int = 256) -> Generate:
    """The vanilla sampler, compiled for prompts in steps of 256 tokens, each with a cache no longer than it needs.

    Batches are powers of two. It draws as many tokens as the longest turn of the schedule, or until all rows stop.
    """
    from tunix.generate.sampler import CacheConfig, Sampler
    from tunix.models.qwen2 import model as qwen2
    from tunix.models.qwen2 import params

    values, config, longest = json.loads((folder / "config.json").read_text()), case.model, case.config.longest
    sizes = qwen2.ModelConfig(
        num_layers=config.layers, vocab_size=config.vocab, embed_dim=config.model, hidden_dim=config.feed_forward,
        num_heads=config.query_heads, head_dim=config.head_dim, num_kv_heads=config.kv_heads,
        rope_theta=int(config.rope_theta), norm_eps=config.norm_eps, use_tied_embedding=values["tie_word_embeddings"],
    )  # fmt: skip
    model = params.create_model_from_safe_tensors(str(folder), sizes)
    samplers: dict[int, Sampler] = {}

    def sampler(width: int) -> Any:
        if width not in samplers:
            cache = CacheConfig(width + longest, config.layers, config.kv_heads, config.head_dim)
            samplers[width] = Sampler(model, _Numbers(case.tokenizer.pad_id, case.stops[0]), cache)
        return samplers[width]

    def generate(transcripts: Sequence[Ids], limits: Sequence[int]) -> list[Ids]:
        width = -(-max(map(len, transcripts)) // step) * step
        size = 1 << (len(transcripts) - 1).bit_length()
        texts = [" ".join(map(str, t)) for t in transcripts]
        drawn = sampler(width)(
            texts + texts[:1] * (size - len(texts)),
            max_generation_steps=longest,
            max_prompt_length=width,
            eos_tokens=case.stops,
            temperature=temperature,
            top_p=1.0 if temperature else None,
            seed=int(np.sum([len(t) for t in transcripts])),
        ).tokens
        return cut([np.asarray(row).tolist() for row in drawn[: len(texts)]], limits, case.stops)

    return generate
