"""LoRA adapters beside PEFT's own: ours act the same in a PeftModel, and PEFT's act the same here."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from array_samples import worst_difference
from hf_samples import from_state, sample_model, write_letters
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from jraggym.errors import InputError
from jraggym.models.attention import soft_cap
from jraggym.models.critic import Critic, critic_scores
from jraggym.models.decoder import branch_forward, init, prefix_forward, unembedding
from jraggym.models.lora import Lora, adapt, lora_specs, merge
from jraggym.porting.peft import CONFIG, PeftAdapters, read_adapters, write_adapters
from jraggym.sharding import make_mesh
from train.export import Arguments, run

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT reads it

IDS = np.random.default_rng(0).integers(3, 64, (3, 11)).astype(np.int32)
LEAVES = ("q", "k", "v", "o")


def random(table):
    """Adapters whose second matrix is not zero."""
    return jax.tree.map(
        lambda a: a + 0.3 * jax.random.normal(jax.random.key(7), a.shape), init(table, jax.random.key(3))
    )


def logits(weights, config):
    def run(weights):
        mask = np.ones_like(IDS[:, :1], bool)
        prefix = prefix_forward(weights, config, IDS[:, :1], mask)
        hidden = branch_forward(weights, config, prefix, IDS[:, None], np.ones_like(IDS[:, None], bool))
        return soft_cap(hidden[:, 0] @ unembedding(weights), config.final_cap)

    return np.asarray(jax.jit(run)(weights))


def theirs(model):
    with torch.no_grad():
        return model(input_ids=torch.tensor(IDS).long()).logits.numpy()


@pytest.mark.parametrize(
    ("name", "leaves"), [("llama3", LEAVES), ("qwen2", ("q", "up", "down")), ("gemma3", LEAVES), ("gemma2", LEAVES)]
)
def test_our_adapters_act_the_same_in_peft(name, leaves, tmp_path):
    model, config, weights = sample_model(name)
    lora = Lora(rank=3, alpha=5.0, leaves=leaves)
    adapters = random(lora_specs(config, lora))
    model.save_pretrained(tmp_path / "base")
    write_adapters(tmp_path / "adapters", PeftAdapters(lora, adapters), config, base=str(tmp_path / "base"))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager")
    served = theirs(peft.PeftModel.from_pretrained(base, tmp_path / "adapters").eval())
    ours = logits(adapt(weights, adapters, lora), config)
    assert worst_difference(ours, served) < 1e-4
    assert worst_difference(ours, logits(weights, config)) > 0.1, "the adapters must change something"
    assert worst_difference(ours, logits(merge(weights, adapters, lora), config)) < 1e-4
    again = read_adapters(tmp_path / "adapters", config, mesh=make_mesh(2, 2, 1))
    assert again.lora == Lora(rank=3, alpha=5.0, leaves=tuple(sorted(leaves, key="qkvo gate up down".find)))
    assert worst_difference({leaf: again.adapters[leaf] for leaf in leaves}, adapters) == 0.0
    assert again.head is None
    assert again.adapters["q"]["a"].sharding.num_devices == 4


@pytest.mark.parametrize("rslora", [False, True])
def test_adapters_of_peft_act_the_same_here(rslora, tmp_path):
    model, config, weights = sample_model("llama")
    model.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager")
    settings = peft.LoraConfig(
        r=4, lora_alpha=6, lora_dropout=0.05, target_modules=["q_proj", "k_proj", "v_proj"], use_rslora=rslora,
        task_type="CAUSAL_LM", init_lora_weights=False,
    )  # fmt: skip
    wrapped = peft.get_peft_model(base, settings).eval()
    wrapped.save_pretrained(tmp_path / "adapters")
    found = read_adapters(tmp_path / "adapters", config)
    assert (found.lora.rank, found.lora.leaves, found.lora.dropout) == (4, ("q", "k", "v"), 0.05)
    ours = logits(adapt(weights, found.adapters, found.lora), config)
    assert worst_difference(ours, theirs(wrapped)) < 1e-4
    assert worst_difference(ours, logits(weights, config)) > 0.1
    merged = {name: p.numpy() for name, p in wrapped.merge_and_unload().state_dict().items()}
    assert worst_difference(merge(weights, found.adapters, found.lora), from_state(merged, config)) < 1e-5


def test_adapters_of_a_critic_bring_their_score_head(tmp_path):
    model, config, trunk = sample_model("llama")
    torch.manual_seed(1)
    values = {**model.config.to_dict(), "num_labels": 1, "pad_token_id": 0}
    base = AutoModelForSequenceClassification.from_config(type(model.config)(**values), attn_implementation="eager")
    base.model.load_state_dict(model.model.state_dict())
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS",
                               modules_to_save=["score"], init_lora_weights=False)  # fmt: skip
    wrapped = peft.get_peft_model(base, settings).eval()
    wrapped.save_pretrained(tmp_path / "theirs")
    found = read_adapters(tmp_path / "theirs", config)
    assert found.head is not None
    expected = theirs(wrapped)[:, 0]

    def scores(found):
        weights = Critic(adapt(trunk, found.adapters, found.lora), found.head)
        prefix = prefix_forward(weights.trunk, config, IDS[:, :1], np.ones_like(IDS[:, :1], bool))
        return critic_scores(weights, config, prefix, jnp.array(IDS[:, None]), np.ones_like(IDS[:, None], bool))[:, 0]

    np.testing.assert_allclose(scores(found), expected, atol=1e-4)
    write_adapters(tmp_path / "ours", found, config, base="base")
    assert json.loads((tmp_path / "ours" / CONFIG).read_text())["task_type"] == "SEQ_CLS"
    again = AutoModelForSequenceClassification.from_config(base.config, attn_implementation="eager")
    again.model.load_state_dict(model.model.state_dict())
    served = peft.PeftModel.from_pretrained(again, tmp_path / "ours").eval()
    np.testing.assert_allclose(theirs(served)[:, 0], expected, atol=1e-5)


def test_adapters_of_a_critic_make_an_actor_a_critic(tmp_path):
    model, config, _ = sample_model("llama3")
    model.save_pretrained(tmp_path / "base")
    write_letters(tmp_path / "base")
    lora = Lora(rank=2, alpha=3.0, leaves=("q", "v"))
    head = 0.1 * np.arange(config.model, dtype=np.float32)
    found = PeftAdapters(lora, random(lora_specs(config, lora)), head)
    write_adapters(tmp_path / "adapters", found, config, base=str(tmp_path / "base"))
    run(Arguments(tmp_path / "base", tmp_path / "critic", merge=tmp_path / "adapters"))
    served = theirs(AutoModelForSequenceClassification.from_pretrained(tmp_path / "critic").eval())[:, 0]
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1, pad_token_id=0)
    wrapped = peft.PeftModel.from_pretrained(base, tmp_path / "adapters").eval()
    np.testing.assert_allclose(served, theirs(wrapped)[:, 0], atol=1e-4)
    with pytest.raises(InputError, match="merged into actors; got critic"):
        run(Arguments(tmp_path / "critic", tmp_path / "again", merge=tmp_path / "adapters"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "this use_dora is not supported; got True"),
        ({"bias": "all"}, "this bias is not supported; got 'all'"),
        ({"rank_pattern": {"q_proj": 8}}, "this rank_pattern is not supported"),
        ({"modules_to_save": ["lm_head"]}, "this modules_to_save is not supported"),
        ({"init_lora_weights": "pissa"}, "this init_lora_weights is not supported; got 'pissa'"),
        ({"use_bdlora": {"nblocks": 2}}, "this use_bdlora is not supported"),
        ({"something_new": 1}, "this something_new is not supported; got 1"),
        ({"peft_type": "IA3"}, "this peft_type is not supported; got 'IA3'"),
        ({"r": None}, "cannot read .*adapter_config.json"),
    ],
)
def test_settings_that_are_not_supported_are_refused_by_name(change, message, tmp_path):
    _, config, _ = sample_model("llama")
    lora = Lora(rank=2)
    write_adapters(tmp_path / "a", PeftAdapters(lora, random(lora_specs(config, lora))), config, base="b")
    path = tmp_path / "a" / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(InputError, match=message):
        read_adapters(tmp_path / "a", config)


def test_adapters_of_another_model_are_refused(tmp_path):
    _, config, _ = sample_model("llama")
    lora = Lora(rank=2)
    write_adapters(tmp_path / "a", PeftAdapters(lora, random(lora_specs(config, lora))), config, base="b")
    with pytest.raises(InputError, match=r"mis-shaped: base_model\.model\.model\.layers\.0\.self_attn"):
        read_adapters(tmp_path / "a", sample_model("qwen3")[1])
    (tmp_path / "a" / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match=r"neither adapter_model\.safetensors"):
        read_adapters(tmp_path / "a", config)
