"""Prefill and decode of our decoder beside transformers, with the same weights in the same process.

    python tests/benchmarks/decoding.py [--model-type qwen3] [--prompt 1024] [--tokens 64] [--repeats 3]

Sequences: 1, 8, and 32 that are 8 candidates of each of 4 prompts. transformers computes each of the 32 from its own
copy of the prompt; ours computes a prompt once. Both decode greedily, and the tokens are compared. Tokens per second
are those of all sequences (a shared prompt counts once for each), best of the repeats; decode is the time of a whole
generation less that of the prefill. Nothing is asserted on time: the figures depend on the machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import tyro
from transformers import AutoConfig, AutoModelForCausalLM

from jraggym.models.decoder import Decoder, DecoderConfig, prefix_forward
from jraggym.models.families import decoder_config
from jraggym.models.tensor_names import TensorName, tensor_names
from jraggym.sampling import Sampling, sample


@dataclass(frozen=True)
class Config:
    """Sizes of the random model and of the texts."""

    model_type: str = "qwen3"
    vocab: int = 4096
    width: int = 384
    layers: int = 6
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 64
    feed_forward: int = 1024
    prompt: int = 1024
    tokens: int = 64
    repeats: int = 3
    shapes: tuple[tuple[int, int], ...] = ((1, 1), (8, 1), (4, 8))  # prompts, candidates of each


def make_models(config: Config) -> tuple[Any, DecoderConfig, Decoder]:
    """The same random model twice."""
    torch.manual_seed(0)
    values = AutoConfig.for_model(
        config.model_type, vocab_size=config.vocab, hidden_size=config.width, num_hidden_layers=config.layers,
        num_attention_heads=config.heads, num_key_value_heads=config.kv_heads, head_dim=config.head_dim,
        intermediate_size=config.feed_forward, initializer_range=0.1, pad_token_id=None,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(values, dtype=torch.float32).eval()
    ours = decoder_config(model.config.to_dict())
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}

    def leaf(spot: TensorName) -> Any:
        names = [spot.name.format(layer=n) for n in range(ours.layers)] if "{layer}" in spot.name else [spot.name]
        found = [state[name].T if spot.transposed else state[name] for name in names]
        return jnp.asarray(np.stack(found) if "{layer}" in spot.name else found[0])

    return model, ours, jax.tree.map(leaf, tensor_names(ours))


def best(function: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """The shortest of `repeats` times after one call to warm up, and what the last call gave."""
    times, found = [], function()
    for _ in range(repeats):
        begin = time.perf_counter()
        found = function()
        times.append(time.perf_counter() - begin)
    return min(times), found


@torch.inference_mode()
def run_theirs(model: Any, config: Config, prompt: np.ndarray, candidates: int) -> tuple[float, float, np.ndarray]:
    ids = torch.tensor(prompt).long().repeat_interleave(candidates, dim=0)
    settings = type(model.generation_config)(
        max_new_tokens=config.tokens, do_sample=False, pad_token_id=0, eos_token_id=config.vocab
    )
    prefill, _ = best(lambda: model(ids, use_cache=True, logits_to_keep=1).logits, config.repeats)
    mask = torch.ones_like(ids)
    run = partial(model.generate, ids, attention_mask=mask, generation_config=settings)
    whole, found = best(run, config.repeats)
    return prefill, whole, found[:, ids.shape[1] :].numpy()


def run_ours(
    weights: Decoder, model: DecoderConfig, config: Config, prompt: np.ndarray, candidates: int
) -> tuple[float, float, np.ndarray]:
    sampling = Sampling(candidates, config.tokens, temperature=0.0)
    mask, keys = np.ones(prompt.shape, bool), jax.random.split(jax.random.key(0), len(prompt))

    @jax.jit
    def prefill(weights: Decoder, prompt: Any) -> Any:
        return prefix_forward(weights, model, prompt, mask)

    @jax.jit
    def generate(weights: Decoder, prompt: Any) -> Any:
        prefix = prefix_forward(weights, model, prompt, mask)
        return sample(weights, model, sampling, prefix, prompt[:, -1], jnp.array([-1]), keys).tokens

    first, _ = best(lambda: jax.block_until_ready(prefill(weights, prompt)), config.repeats)
    whole, found = best(lambda: jax.block_until_ready(generate(weights, prompt)), config.repeats)
    return first, whole, np.asarray(found).reshape(-1, config.tokens)


def main(config: Config) -> None:
    theirs, model, weights = make_models(config)
    count = sum(leaf.size for leaf in jax.tree.leaves(weights))
    print(f"{config.model_type}, {count / 1e6:.1f} M weights, {config.prompt} prompt and {config.tokens} new tokens")
    print(f"{'sequences':>16} {'':>12} {'prefill/s':>10} {'decode/s':>10} {'generation s':>13}  same tokens")
    for prompts, candidates in config.shapes:
        prompt = np.random.default_rng(0).integers(0, config.vocab, (prompts, config.prompt), dtype=np.int32)
        n = prompts * candidates
        results = [
            run_theirs(theirs, config, prompt, candidates),
            run_ours(weights, model, config, prompt, candidates),
        ]
        rates = [(n * config.prompt / p, n * config.tokens / (w - p), w) for p, w, _ in results]
        same = np.mean(results[0][2] == results[1][2])
        for name, (prefill, decode, whole) in zip(("transformers", "ours"), rates, strict=True):
            print(f"{f'{prompts} x {candidates}':>16} {name:>12} {prefill:10.0f} {decode:10.0f} {whole:13.3f}")
        ratios = [ours / peer for ours, peer in zip(rates[1], rates[0], strict=True)]
        print(f"{'':>16} {'ratio':>12} {ratios[0]:10.2f} {ratios[1]:10.2f} {1 / ratios[2]:13.2f}  {same:.1%}")


if __name__ == "__main__":
    main(tyro.cli(Config))
