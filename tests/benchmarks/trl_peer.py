"""The side of TRL in trl_steps.py: random Llama weights, and its own trainers run on written-out sequences.

Each entry is called in a process of its own, with the folder that holds the problem (see `trl_steps.write_problem`).
"""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer

PAD, END = 0, 1  # token ids; all others are plain


def prepare(folder: Path) -> None:
    """Writes the weights (policy, frozen reference, critic) and GRPO's given log-probabilities."""
    config, arrays = _problem(folder)
    torch.manual_seed(config["seed"])
    llama = LlamaConfig(
        vocab_size=config["vocab"],
        hidden_size=config["hidden"],
        intermediate_size=config["feed_forward"],
        num_hidden_layers=config["layers"],
        num_attention_heads=config["heads"],
        num_key_value_heads=config["heads"],
        max_position_embeddings=config["prompt"] + config["action"],
        initializer_range=config["hidden"] ** -0.5,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=END,
    )
    llama.num_labels = 1  # of the critic
    policy = LlamaForCausalLM(llama)
    reference = copy.deepcopy(policy)
    with torch.no_grad():
        for weight in reference.parameters():
            weight.add_(0.05 * llama.initializer_range * torch.randn_like(weight))
    critic = LlamaForSequenceClassification(llama)
    critic.model.load_state_dict(policy.model.state_dict())
    for name, model in (("policy", policy), ("reference", reference), ("critic", critic)):
        model.save_pretrained(folder / name)
    group = arrays["action"][:, : config["group"]]
    old = np.stack([_logprobs(reference.eval(), *state) for state in zip(arrays["prompt"], group, strict=True)])
    noise = 0.05 * np.random.default_rng(config["seed"]).standard_normal(old.shape)
    np.savez(folder / "given.npz", old=old, reference=(old + noise).astype(np.float32))


@torch.no_grad()
def _logprobs(model: Any, prompt: np.ndarray, action: np.ndarray) -> np.ndarray:
    """Log-probabilities [K, A] of the actions behind one prompt, by the model's plain forward."""
    ids = torch.tensor(np.concatenate([np.tile(prompt, (len(action), 1)), action], axis=1)).long()
    logits = model(ids).logits[:, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, ids[:, len(prompt) :, None])[..., 0].numpy()


class Clock(TrainerCallback):
    """Seconds of the first update, and of all later ones together."""

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.begin = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 1:
            self.first = time.perf_counter()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.end = time.perf_counter()


def measure(folder: Path, task: str, size: int, updates: int) -> dict[str, Any]:
    """Runs TRL's trainer for 1 + `updates` updates with `size` sequences or pairs on the device at one time.

    The first update is a warm-up, and its loss is the one reported; accumulation makes the updates those of the
    other side.
    """
    config, arrays = _problem(folder)
    before = resident("VmRSS")
    trainer = {"dpo": _dpo, "critic": _critic, "grpo": _grpo}[task](folder, config, arrays, size, updates)
    clock, tokens = Clock(), 0
    trainer.add_callback(clock)

    def count(_module: Any, args: tuple, kwargs: dict) -> None:
        nonlocal tokens
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        tokens += ids.numel()

    for model in filter(None, (trainer.model, getattr(trainer, "ref_model", None))):
        model.register_forward_pre_hook(count, with_kwargs=True)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    if len(losses) != updates + 1:
        raise SystemExit(f"TRL made {len(losses)} updates instead of {updates + 1}")
    return {
        "loss": losses[0],
        "tokens": tokens * updates // (updates + 1),
        "warmup": clock.first - clock.begin,
        "seconds": clock.end - clock.first,
        "size": size,
        "before": before,
        "peak": resident("VmHWM"),
        "threads": torch.get_num_threads(),
        "version": f"trl {trl.__version__}, transformers {transformers.__version__}, torch {torch.__version__}",
    }


def fastest(folder: Path, task: str, sizes: list[int]) -> int:
    """The size with which two updates after a warm-up take the least time."""
    seconds = {size: measure(folder, task, size, 2)["seconds"] for size in sizes}
    return min(seconds, key=seconds.__getitem__)


def resident(field: str) -> float:
    """MiB of this process: VmRSS now, VmHWM at its highest."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(field + ":")[1].split()[0]) / 1024


def _problem(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    return json.loads((folder / "config.json").read_text()), dict(np.load(folder / "problem.npz"))


def _arguments(folder: Path, config: dict[str, Any], size: int, each: int) -> dict[str, Any]:
    """What all three trainers share; `each` is the number of sequences or pairs in one update."""
    if each % size:
        raise SystemExit(f"{each} sequences or pairs of an update are no multiple of {size}; change --sizes")
    return {
        "output_dir": str(folder / "out"),
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": each // size,
        "num_train_epochs": 1,
        "learning_rate": config["rate"],
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "gradient_checkpointing": False,  # the faster way; TRL's default is to recompute
        "bf16": False,
        "use_cpu": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "train_sampling_strategy": "sequential",
        "remove_unused_columns": False,
    }


def _tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """Token i is the word "ti"."""
    words = {"<pad>": PAD, "<end>": END, **{f"t{i}": i for i in range(END + 1, vocab)}}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")


def _text(ids: np.ndarray) -> str:
    return "".join(" <end>" if i == END else f" t{i}" for i in ids)


def _pairs(arrays: dict[str, np.ndarray], rows: int, updates: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(prompt, chosen, rejected) of the first states, as the reference writes them out: positives x negatives."""
    found = []
    for i in range(rows * (updates + 1)):
        good, bad = (np.flatnonzero(which[i]) for which in (arrays["reward"] > 0.75, arrays["reward"] < 0.5))
        found += [(arrays["prompt"][i], arrays["action"][i, x], arrays["action"][i, y]) for x in good for y in bad]
    return found


def _dpo(folder: Path, config: dict[str, Any], arrays: dict[str, np.ndarray], size: int, updates: int) -> Any:
    pairs = _pairs(arrays, config["rows"], updates)
    columns = ("prompt", "chosen", "rejected")
    rows = [dict(zip(columns, map(_text, pair), strict=True)) for pair in pairs]
    shared = _arguments(folder, config, size, len(pairs) // (updates + 1))
    return DPOTrainer(
        LlamaForCausalLM.from_pretrained(folder / "policy"),
        LlamaForCausalLM.from_pretrained(folder / "reference"),
        args=DPOConfig(beta=config["beta"], max_length=None, **shared),
        train_dataset=Dataset.from_list(rows),
        processing_class=_tokenizer(config["vocab"]),
    )


def _critic(folder: Path, config: dict[str, Any], arrays: dict[str, np.ndarray], size: int, updates: int) -> Any:
    pairs = _pairs(arrays, config["rows"], updates)
    sides = [
        {"chosen_ids": np.concatenate([prompt, chosen]), "rejected_ids": np.concatenate([prompt, rejected])}
        for prompt, chosen, rejected in pairs
    ]
    shared = _arguments(folder, config, size, len(pairs) // (updates + 1))
    return RewardTrainer(
        LlamaForSequenceClassification.from_pretrained(folder / "critic"),
        args=RewardConfig(center_rewards_coefficient=config["centre"], max_length=None, **shared),
        train_dataset=Dataset.from_list(sides),
        processing_class=_tokenizer(config["vocab"]),
    )


class GivenCompletions(GRPOTrainer):
    """GRPO on completions that are given instead of generated; loss and loop are TRL's own."""

    given: dict[str, torch.Tensor]  # each [states, K, ...]

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        state = torch.tensor([row["state"] for row in inputs])
        within = torch.arange(len(inputs)) % self.given["advantages"].shape[1]
        found = {name: values[state, within] for name, values in self.given.items()}
        ones = {name: torch.ones_like(found[f"{name}_ids"]) for name in ("prompt", "completion")}
        masks = {f"{name}_mask": mask for name, mask in ones.items()}
        return {**found, **masks, "num_items_in_batch": ones["completion"].sum()}


def _no_reward(completions: list[Any], **_: Any) -> list[float | None]:
    return [0.0] * len(completions)


def _grpo(folder: Path, config: dict[str, Any], arrays: dict[str, np.ndarray], size: int, updates: int) -> Any:
    k, given = config["group"], np.load(folder / "given.npz")
    shared = _arguments(folder, config, size, config["rows"] * k)
    trainer = GivenCompletions(
        str(folder / "policy"),
        _no_reward,
        args=GRPOConfig(
            num_generations=k,
            beta=config["kl"],
            epsilon=config["clip"],
            loss_type="bnpo",  # the mean over all tokens
            use_bias_correction_kl=False,  # plain k3; by default it is weighted with the ratio
            max_completion_length=config["action"],
            shuffle_dataset=False,
            **shared,
        ),
        train_dataset=Dataset.from_list([{"prompt": "", "state": i} for i in range(config["rows"] * (updates + 1))]),
        processing_class=_tokenizer(config["vocab"]),
    )
    trainer.given = {
        "prompt_ids": torch.tensor(arrays["prompt"]).long()[:, None].expand(-1, k, -1),
        "completion_ids": torch.tensor(arrays["action"][:, :k]).long(),
        "advantages": torch.tensor(arrays["advantage"]),
        "old_per_token_logps": torch.tensor(given["old"]),
        "ref_per_token_logps": torch.tensor(given["reference"]),
    }
    return trainer
