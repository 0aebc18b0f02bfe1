"""How far each family is from transformers and PEFT: the largest differences on a small random model, as a table.

    python tests/benchmarks/agreement.py

import: weights read from a saved folder; logits, cache (one token at a time) and LoRA: logits in float32; generate:
greedy tokens of 64 that agree; export: weights after import, export and import; critic: scores of the classifier.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import torch
import tyro
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hf_samples import FAMILIES, sample_model, write_letters

from jraggym.model_folder import Model
from jraggym.models.attention import soft_cap
from jraggym.models.critic import critic_scores, critic_specs
from jraggym.models.decoder import branch_forward, decode_step, empty_cache, init, prefix_forward, unembedding
from jraggym.models.lora import Lora, adapt, lora_specs
from jraggym.porting.peft import PeftAdapters, write_adapters
from jraggym.porting.pretrained import export_model, load_pretrained
from jraggym.sampling import Sampling, sample

IDS = np.random.default_rng(0).integers(3, 64, (2, 24)).astype(np.int32)
COLUMNS = ("import", "logits", "cache", "generate", "LoRA", "export", "critic")


@dataclasses.dataclass(frozen=True)
class Config:
    """Which samples of tests/hf_samples.py."""

    families: tuple[str, ...] = tuple(FAMILIES)


def real(ids: np.ndarray) -> np.ndarray:
    return np.ones_like(ids, bool)


def logits(weights: Any, config: Any) -> np.ndarray:
    prefix = prefix_forward(weights, config, IDS[:, :1], real(IDS[:, :1]))
    hidden = branch_forward(weights, config, prefix, IDS[:, None], real(IDS[:, None]))[:, 0]
    return np.asarray(soft_cap(hidden @ unembedding(weights), config.final_cap))


def stepwise(weights: Any, config: Any) -> np.ndarray:
    prefix = prefix_forward(weights, config, IDS[:, :1], real(IDS[:, :1]))
    cache, found = empty_cache(config, prefix, 1, IDS.shape[1]), []
    step = jax.jit(decode_step, static_argnums=1)
    for slot in range(IDS.shape[1]):
        hidden, cache = step(weights, config, prefix, cache, jnp.int32(slot), IDS[:, slot : slot + 1])
        found.append(soft_cap(hidden[:, 0] @ unembedding(weights), config.final_cap))
    return np.stack(found, axis=1)


def generated(weights: Any, config: Any, model: Any) -> int:
    options = type(model.generation_config)(max_new_tokens=64, do_sample=False, pad_token_id=0, eos_token_id=64)
    ids = torch.tensor(IDS).long()
    theirs = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=options)
    prefix = prefix_forward(weights, config, IDS, real(IDS))
    keys = jax.random.split(jax.random.key(0), len(IDS))
    greedy = Sampling(candidates=1, max_tokens=64, temperature=0.0)
    found = jax.jit(lambda w: sample(w, config, greedy, prefix, IDS[:, -1], jnp.array([-1]), keys).tokens)(weights)
    return int((np.asarray(found)[:, 0] == theirs[:, IDS.shape[1] :].numpy()).all(axis=0).sum())


def run_torch(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(input_ids=torch.tensor(IDS).long()).logits.numpy()


def worst(left: Any, right: Any) -> float:
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    return max(float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in pairs)


def row(name: str, root: Path) -> list[str]:
    """One family's cells."""
    model, config, weights = sample_model(name)
    model.save_pretrained(root / "in")
    write_letters(root / "in")
    imported = load_pretrained(root / "in", "actor")
    export_model(imported, root / "out")
    again = load_pretrained(root / "out", "actor")
    ours, theirs = logits(imported.weights, config), run_torch(model)

    lora = Lora(rank=2, alpha=4.0)
    adapters = jax.tree.map(lambda a: a + 0.1, init(lora_specs(config, lora), jax.random.key(1)))
    write_adapters(root / "lora", PeftAdapters(lora, adapters), config, base=str(root / "in"))
    base = AutoModelForCausalLM.from_pretrained(root / "in", attn_implementation="eager")
    wrapped = peft.PeftModel.from_pretrained(base, root / "lora").eval()

    critic = dataclasses.replace(init(critic_specs(config), jax.random.key(2)), trunk=weights)
    export_model(Model("critic", config, imported.tokenizer, critic, imported.about), root / "critic")
    judge = AutoModelForSequenceClassification.from_pretrained(root / "critic", attn_implementation="eager").eval()
    prefix = prefix_forward(weights, config, IDS[:, :1], real(IDS[:, :1]))
    scores = critic_scores(critic, config, prefix, jnp.array(IDS[:, None]), real(IDS[:, None]))
    differences = {
        "import": worst(imported.weights, weights),
        "logits": worst(ours, theirs),
        "cache": worst(stepwise(imported.weights, config), theirs),
        "LoRA": worst(logits(adapt(imported.weights, adapters, lora), config), run_torch(wrapped)),
        "export": worst(again.weights, imported.weights),
        "critic": worst(scores, run_torch(judge)),
    }
    cells = {column: f"{value:.0e}" if value else "0" for column, value in differences.items()}
    cells["generate"] = f"{generated(imported.weights, config, model)} of 64"
    return [cells[column] for column in COLUMNS]


def main() -> None:
    """Prints the table."""
    config = tyro.cli(Config, description=__doc__)
    print(f"| family | {' | '.join(COLUMNS)} |\n|{'---|' * (len(COLUMNS) + 1)}")
    for name in config.families:
        with tempfile.TemporaryDirectory() as root:
            print(f"| {name} | {' | '.join(row(name, Path(root)))} |", flush=True)


if __name__ == "__main__":
    main()
