"""The side of jraggym in trl_steps.py: the weights of Hugging Face's Llama, and the library's jitted updates."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from safetensors.numpy import load_file

from jraggym.batch import ProcessBatch
from jraggym.models.critic import Critic
from jraggym.models.decoder import Decoder, DecoderConfig, Layer
from jraggym.objectives.policy import Experience, PolicyLoss
from jraggym.steps import Network, critic, dpo, policy
from jraggym.training import Step, init_state

Task = tuple[Callable, Any, Any, list[Any]]  # objective, weights, frozen weights, one batch for each update


def measure(folder: Path, task: str) -> dict[str, Any]:
    """Makes all updates of the problem in `folder`; the first one compiles and is timed apart."""
    before = resident("VmRSS")
    config, arrays = json.loads((folder / "config.json").read_text()), dict(np.load(folder / "problem.npz"))
    objective, weights, frozen, batches = {"dpo": _dpo, "critic": _critic, "grpo": _grpo}[task](folder, config, arrays)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(config["rate"], weight_decay=0.0))
    step, frozen = Step(objective, optimizer), jax.device_put(frozen)
    begin = time.perf_counter()
    state, metrics = step(init_state(weights, optimizer), batches[0], frozen)
    loss = float(metrics["loss"])
    first = time.perf_counter()
    for batch in batches[1:]:
        state, metrics = step(state, batch, frozen)
    jax.block_until_ready((state, metrics))
    seconds = time.perf_counter() - first
    k, models = (config["group"], 1) if task == "grpo" else (config["candidates"], 2 if task == "dpo" else 1)
    return {
        "loss": loss,
        "tokens": config["states"] * models * (config["prompt"] - 1 + k * (config["action"] + 1)),
        "warmup": first - begin,
        "seconds": seconds,
        "before": before,
        "peak": resident("VmHWM"),
        "threads": len(os.sched_getaffinity(0)),
        "version": f"jax {jax.__version__}",
    }


def resident(field: str) -> float:
    """MiB of this process: VmRSS now, VmHWM at its highest."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(field + ":")[1].split()[0]) / 1024


def import_llama(folder: Path, config: dict[str, Any]) -> tuple[Decoder, DecoderConfig]:
    """Weights and configuration from `folder`, in which Hugging Face's Llama was saved."""
    found = load_file(folder / "model.safetensors")
    vocab, d = found["model.embed_tokens.weight"].shape
    layers = 1 + max(int(name.split(".")[2]) for name in found if name.startswith("model.layers."))

    def stack(name: str) -> np.ndarray:  # Hugging Face's matrices are [out, in]
        return np.stack([found[f"model.layers.{i}.{name}.weight"].T for i in range(layers)])

    head = found.get("lm_head.weight")  # the critic has none
    weights = Decoder(
        embed=found["model.embed_tokens.weight"] / d**0.5,  # the decoder multiplies by D^0.5
        layers=Layer(
            attention_norm=stack("input_layernorm"),
            **{name: stack(f"self_attn.{name}_proj") for name in "qkvo"},
            **dict.fromkeys(("q_bias", "k_bias", "v_bias")),
            mlp_norm=stack("post_attention_layernorm"),
            **{name: stack(f"mlp.{name}_proj") for name in ("gate", "up", "down")},
        ),
        final_norm=found["model.norm.weight"],
        unembed=None if head is None else head.T,
    )
    return weights, DecoderConfig(
        vocab=vocab,
        model=d,
        layers=layers,
        query_heads=config["heads"],
        kv_heads=config["heads"],
        head_dim=d // config["heads"],
        feed_forward=weights.layers.gate.shape[2],
        rope_theta=10_000.0,
        tied=head is None,
        qkv_bias=False,
        remat=config["remat"],
    )


def _batches(config: dict[str, Any], arrays: dict[str, np.ndarray], candidates: int) -> list[ProcessBatch]:
    def batch(rows: slice) -> ProcessBatch:
        prompt, action = arrays["prompt"][rows], arrays["action"][rows, :candidates]
        real, reward = np.ones(action.shape, bool), arrays["reward"][rows, :candidates]
        return ProcessBatch(
            prompt=prompt,
            prompt_mask=np.ones(prompt.shape, bool),
            action=action,
            action_mask=real,
            loss_mask=real,
            reward=reward,
            candidate_mask=np.ones(reward.shape, bool),
            behaviour_logprob=np.zeros(action.shape, np.float32),
        )

    return [batch(rows) for rows in _slices(config, arrays)]


def _slices(config: dict[str, Any], arrays: dict[str, np.ndarray]) -> list[slice]:
    """The states of each update."""
    return [slice(start, start + config["rows"]) for start in range(0, len(arrays["prompt"]), config["rows"])]


def _dpo(folder: Path, config: dict[str, Any], arrays: dict[str, np.ndarray]) -> Task:
    weights, model = import_llama(folder / "policy", config)
    frozen, _ = import_llama(folder / "reference", config)
    batches = _batches(config, arrays, config["candidates"])
    return dpo(Network(model), beta=config["beta"]), weights, frozen, batches


def _critic(folder: Path, config: dict[str, Any], arrays: dict[str, np.ndarray]) -> Task:
    trunk, model = import_llama(folder / "critic", config)
    head = load_file(folder / "critic" / "model.safetensors")["score.weight"][0]
    batches = _batches(config, arrays, config["candidates"])
    return critic(Network(model), centre=config["centre"]), Critic(trunk, head), None, batches


def _grpo(folder: Path, config: dict[str, Any], arrays: dict[str, np.ndarray]) -> Task:
    weights, model = import_llama(folder / "policy", config)
    how = PolicyLoss(clip_low=config["clip"], clip_high=config["clip"], kl="k3", kl_weight=config["kl"])
    given, batches = np.load(folder / "given.npz"), _batches(config, arrays, config["group"])
    experiences = [
        Experience(
            batch=batch,
            advantage=np.broadcast_to(arrays["advantage"][rows, :, None], batch.action.shape),
            old_logprob=given["old"][rows],
            reference_logprob=given["reference"][rows],
        )
        for rows, batch in zip(_slices(config, arrays), batches, strict=True)
    ]
    return policy(Network(model), how), weights, None, experiences
