"""Weights of Hugging Face folders in and out: bit for bit, streamed, whole or not at all, every name accounted for."""

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import tracemalloc
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from array_samples import worst_difference
from chat_families import write_family
from hf_samples import FAMILIES, hf_model, sample_model, write_letters
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
)

from jraggym.errors import InputError
from jraggym.model_folder import Model, load_model, save_model
from jraggym.models.critic import critic_scores, critic_specs
from jraggym.models.decoder import DecoderConfig, branch_forward, init, prefix_forward, specs, unembedding
from jraggym.models.families import decoder_config
from jraggym.models.tensor_names import tensor_names
from jraggym.porting.pretrained import export_model, load_pretrained, open_model
from jraggym.porting.reading import Checkpoint, read_weights
from jraggym.sharding import make_mesh, shardings
from jraggym.text.chat import ChatCodec
from jraggym.text.huggingface import HuggingFaceTokenizer
from jraggym.text.tokenizer import SentencePieceTokenizer
from jraggym.types import State
from jraggym.whole import whole_folder

TEXTS = ["Where was Ada Morn born?", "Bexlis is a city by the river Torvan.", "<search> Morn mayor</search>"] * 9


@pytest.fixture(scope="module")
def tokenizer():
    return SentencePieceTokenizer.train(TEXTS, 320)


@pytest.fixture(scope="module")
def tiny(tokenizer):
    """An actor of our own shape."""
    config = DecoderConfig(vocab=tokenizer.vocab_size, model=24, query_heads=2, kv_heads=1, head_dim=12)
    return Model("actor", config, tokenizer, init(specs(config), jax.random.key(0)), {"seed": 0})


def folder_of(name, path, dtype, **options):
    """A folder as transformers writes it, with the tokenizer that every folder needs."""
    model = hf_model(name)
    copy = type(model)(model.config)
    copy.load_state_dict(model.state_dict())
    copy.to(getattr(torch, dtype)).save_pretrained(path, **options)
    return path


def state_of(path):
    return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def same_bits(left, right):
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert torch.equal(tensor.view(torch.uint8), right[name].view(torch.uint8)), name


# ---------------------------------------------------------------- in, out and in again


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_comes_in_and_goes_out_bit_for_bit(name, dtype, tmp_path):
    source = folder_of(name, tmp_path / "in", dtype, max_shard_size="20KB")
    write_letters(source)
    assert len(list(source.glob("*.safetensors"))) > 1, "the sample is to be sharded"
    model = load_pretrained(source, "actor")
    _, config, expected = sample_model(name)
    assert model.config == config
    wanted = jax.tree.map(lambda leaf: np.asarray(jnp.asarray(leaf).astype(dtype).astype("float32")), expected)
    assert worst_difference(model.weights, wanted) == 0.0
    export_model(model, tmp_path / "out", dtype=dtype, limit=20_000)
    same_bits(state_of(tmp_path / "out"), state_of(source))
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    loaded, found = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=getattr(torch, dtype), output_loading_info=True
    )
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.config.model_type == hf_model(name).config.model_type
    again = load_pretrained(tmp_path / "out", "actor")
    assert again.config == config
    assert worst_difference(again.weights, model.weights) == 0.0


@pytest.mark.parametrize("mesh", [(2, 2, 2), (1, 4, 1), (1, 1, 2)])
def test_weights_land_in_their_sharding(mesh, tmp_path):
    source = folder_of("qwen3", tmp_path / "in", "float32")
    config = decoder_config(json.loads((source / "config.json").read_text()))
    mesh = make_mesh(*mesh)
    found = read_weights(Checkpoint.open(source), specs(config), tensor_names(config), mesh=mesh)
    places = shardings(specs(config), mesh)
    for leaf, place in zip(jax.tree.leaves(found), jax.tree.leaves(places), strict=True):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim)
    assert worst_difference(found, sample_model("qwen3")[2]) == 0.0


@pytest.mark.parametrize("mesh", [None, (2, 2, 2)])
def test_the_host_holds_one_tensor_at_a_time(mesh, tmp_path):
    sizes = {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 1024}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=4096, **sizes), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "big", max_shard_size="3MB")
    checkpoint = Checkpoint.open(tmp_path / "big")
    config = decoder_config(json.loads((tmp_path / "big" / "config.json").read_text()))
    mesh = None if mesh is None else make_mesh(*mesh)
    arguments = checkpoint, specs(config), tensor_names(config)
    read_weights(*arguments, mesh=mesh)  # what jax itself allocates when it compiles
    tracemalloc.start()  # counts what numpy holds, and not the arrays of the devices
    before = tracemalloc.get_traced_memory()[0]
    read_weights(*arguments, mesh=mesh)
    peak = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    largest = max(2 * int(np.prod(shape)) for shape in checkpoint.shapes.values())
    assert 0.5 * largest < peak < 1.3 * largest, f"{peak / largest:.2f} times the largest tensor"


# ---------------------------------------------------------------- what does not fit


def test_names_are_all_accounted_for(tmp_path):
    source = folder_of("llama3", tmp_path / "in", "float32")
    write_letters(source)
    file = source / "model.safetensors"
    state = load_file(file)
    whole = dict(state)
    state["model.layers.0.extra.weight"] = torch.zeros(3)
    state["model.layers.1.self_attn.q_proj.weight"] = torch.zeros(5, 32)
    del state["model.norm.weight"]
    save_file(state, file)
    with pytest.raises(InputError) as refused:
        load_pretrained(source, "actor")
    for part in (
        "1 missing: model.norm.weight (32,)",
        "1 unexpected: model.layers.0.extra.weight (3,)",
        "1 mis-shaped: model.layers.1.self_attn.q_proj.weight is (5, 32), not (48, 32)",
    ):
        assert part in str(refused.value)
    save_file({**whole, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(6)}, file)
    load_pretrained(source, "actor")  # of old files; no weight
    save_file({**whole, "model.norm.weight": torch.zeros(32, dtype=torch.int8)}, file)
    with pytest.raises(InputError, match=r"model\.norm\.weight I8"):
        load_pretrained(source, "actor")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: (path / "model.safetensors").unlink(), "neither model.safetensors nor model.safetensors.index"),
        (lambda path: (path / "model.safetensors").write_bytes(b"{}"), "cannot read .*model.safetensors"),
        (lambda path: (path / "config.json").unlink(), "no model in"),
        (lambda path: (path / "config.json").write_text("[1]"), "no model in"),
        (lambda path: (path / "tokenizer.json").write_text("{"), "cannot read the tokenizer"),
    ],
)
def test_broken_folders_are_refused_by_name(spoil, message, tmp_path):
    source = folder_of("llama", tmp_path / "in", "float32")
    write_letters(source)
    spoil(source)
    with pytest.raises(InputError, match=message):
        load_pretrained(source, "actor")


def test_kinds_and_sizes_must_fit(tmp_path, tiny):
    source = folder_of("llama", tmp_path / "in", "float32")
    write_letters(source)
    with pytest.raises(InputError, match="this model is no critic; got LlamaForCausalLM"):
        load_pretrained(source, "critic")
    with pytest.raises(InputError, match=r"no such model; got nowhere.*owner/repository@commit"):
        open_model("nowhere", "actor")
    export_model(tiny, tmp_path / "tiny")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tmp_path / "tiny" / name, source / name)
    with pytest.raises(InputError, match="has more tokens than the model"):
        load_pretrained(source, "actor")


# ---------------------------------------------------------------- our own models


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_our_actor_speaks_the_same_in_torch(dtype, tiny, tmp_path):
    export_model(tiny, tmp_path / "out", dtype=dtype)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer(TEXTS[0], add_special_tokens=False)["input_ids"]
    assert ids == tiny.tokenizer.encode([TEXTS[0]])[0]
    assert theirs.generation_config.eos_token_id == [tiny.tokenizer.token_id(t) for t in ("</search>", "</answer>")]
    again = load_pretrained(tmp_path / "out", "actor")
    assert again.tokenizer.model == tiny.tokenizer.model
    prompt, mask = np.array([ids], np.int32), np.ones((1, len(ids)), bool)

    def logits(model):
        prefix = prefix_forward(model.weights, model.config, prompt[:, :1], mask[:, :1])
        hidden = branch_forward(model.weights, model.config, prefix, prompt[:, None], mask[:, None])
        return np.asarray(hidden @ unembedding(model.weights))[0, 0]

    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits[0].numpy()
    assert worst_difference(logits(again), expected) < 1e-4
    if dtype == "float32":
        assert worst_difference(logits(tiny), logits(again)) < 1e-5
    export_model(again, tmp_path / "again", dtype=dtype)
    same_bits(state_of(tmp_path / "again"), state_of(tmp_path / "out"))


def scored(weights, config, ids, tail):
    """The score of one action behind one prompt."""
    prompt, branch = np.array([ids], np.int32), np.array([[[ids[-1], *tail]]], np.int32)

    @jax.jit
    def run(weights):
        prefix = prefix_forward(weights.trunk, config, prompt, np.ones_like(prompt, bool))
        return critic_scores(weights, config, prefix, branch, np.ones_like(branch, bool))[0, 0]

    return float(run(weights))


@pytest.mark.parametrize("name", ["tiny", "qwen2", "gemma3", "llama3"])
def test_a_critic_scores_the_same_in_torch(name, tiny, tmp_path):
    if name == "tiny":
        config, trunk, tokenizer = tiny.config, tiny.weights, tiny.tokenizer
    else:
        _, config, trunk = sample_model(name)
        write_letters(tmp_path / "words")
        (tmp_path / "words" / "config.json").write_text(json.dumps({"model_type": "llama"}))
        tokenizer = HuggingFaceTokenizer.load(tmp_path / "words")
    weights = dataclasses.replace(init(critic_specs(config), jax.random.key(1)), trunk=trunk)
    model = Model("critic", config, tokenizer, weights, {})
    export_model(model, tmp_path / "out")
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", num_labels=1).eval()
    served = AutoTokenizer.from_pretrained(tmp_path / "out")
    texts = [("Where was Ada Morn born?", "<search> Ada</search>"), ("Is it?", "<answer> yes</answer>")]
    for state, action in texts:
        prompt, tail = tokenizer.encode([state, action])
        assert served(state + action, add_special_tokens=False)["input_ids"] == prompt + tail
        with torch.no_grad():
            expected = theirs(torch.tensor([prompt + tail])).logits[0, 0]
        assert scored(weights, config, prompt, tail) == pytest.approx(float(expected), abs=1e-4)
    again = load_pretrained(tmp_path / "out", "critic")
    assert worst_difference(again.weights.head, weights.head) == 0.0


@pytest.mark.parametrize("family", ["mistral", "llama", "qwen"])
def test_a_chat_critic_reads_the_end_of_the_turn_in_torch(family, tmp_path):
    """Also of a family whose only spare token is the one that ends a turn: as padding it would not be read."""
    write_family(family, tmp_path / "in")
    codec = ChatCodec(HuggingFaceTokenizer.load(tmp_path / "in"), 4, 2_000)
    config = DecoderConfig(
        vocab=512, model=24, query_heads=2, kv_heads=1, head_dim=12, qkv_bias=False, scale_embed=False
    )
    weights = init(critic_specs(config), jax.random.key(1))
    model_type = {"qwen": "qwen3"}.get(family, family)
    export_model(
        Model("critic", config, codec.tokenizer, weights, {"config": {"model_type": model_type}}), tmp_path / "out"
    )
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    served = AutoTokenizer.from_pretrained(tmp_path / "out")
    prompt, (short, long) = (
        codec.prompt(State("Who?")),
        codec.encode(["<answer> yes</answer>", "<search> Bexlis</search>"]),
    )
    assert short[-1] == codec.stops[0]
    padded = served.pad({"input_ids": [prompt + short, prompt + long]}, padding_side="right", return_tensors="pt")
    with torch.no_grad():
        expected = theirs(**padded).logits[:, 0]
    for action, score in zip((short, long), expected, strict=True):
        assert scored(weights, config, prompt, action) == pytest.approx(float(score), abs=1e-4)
    assert load_pretrained(tmp_path / "out", "critic").tokenizer.end_ids == codec.stops


def test_a_critic_that_counts_likelihoods_is_refused(tiny, tmp_path):
    table = critic_specs(tiny.config, likelihood=True)
    model = replace(tiny, kind="critic", weights=init(table, jax.random.key(1)))
    with pytest.raises(InputError, match=r"no counterpart in transformers.*--no-likelihood"):
        export_model(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["../elsewhere.safetensors", "/etc/passwd", 3, "gone.safetensors"])
def test_an_index_stays_in_its_folder(place, tmp_path):
    (tmp_path / "in").mkdir()
    save_file({"a": torch.zeros(2)}, tmp_path / "elsewhere.safetensors")
    (tmp_path / "in" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": place}}))
    with pytest.raises(InputError, match=r"leads out of its folder|names missing files"):
        Checkpoint.open(tmp_path / "in")


def test_what_float16_cannot_hold_is_named(tiny, tmp_path):
    large = tiny.weights.replace(final_norm=7e4 * jnp.ones_like(tiny.weights.final_norm))
    with pytest.raises(InputError, match=r"model\.norm\.weight does not fit float16"):
        export_model(replace(tiny, weights=large), tmp_path / "out", dtype="float16")
    assert not list(tmp_path.iterdir()), "nothing half-written stays"


def test_a_model_folder_keeps_a_tokenizer_of_hugging_face(tmp_path):
    source = folder_of("qwen2", tmp_path / "in", "float32")
    write_letters(source)
    model = load_pretrained(source, "actor")
    save_model(tmp_path / "ours", model)
    again = load_model(tmp_path / "ours", "actor", make_mesh(2, 2, 1))
    assert again.config == model.config
    assert worst_difference(again.weights, model.weights) == 0.0
    assert again.weights.embed.sharding.num_devices == 4
    assert again.tokenizer.encode(TEXTS) == model.tokenizer.encode(TEXTS)
    assert open_model(tmp_path / "ours", "actor").about == model.about


# ---------------------------------------------------------------- whole or not at all

SLOW = """
import sys, time
from jraggym.porting import writing
from jraggym.porting.pretrained import export_model, open_model
save = writing.save_file
def slow(*arguments, **options):
    save(*arguments, **options)
    print("written", flush=True)
    time.sleep(60)
writing.save_file = slow
export_model(open_model(sys.argv[1], "actor"), sys.argv[2], limit=20_000)
"""


def test_a_killed_export_leaves_no_half_folder(tiny, tmp_path):
    save_model(tmp_path / "model", tiny)
    export_model(tiny, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    for target in ("new", "out"):
        command = [sys.executable, "-c", SLOW, tmp_path / "model", tmp_path / target]
        process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "written\n"
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    assert not (tmp_path / "new").exists()
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    export_model(tiny, tmp_path / "new")
    same_bits(state_of(tmp_path / "new"), state_of(tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.building", "model", "new", "out"]


def test_a_kill_between_the_renames_loses_nothing(tmp_path):
    old = tmp_path / ".out.old"
    old.mkdir()
    (old / "weights").write_text("the only whole copy")
    with pytest.raises(RuntimeError), whole_folder(tmp_path / "out"):
        raise RuntimeError("and the next try fails, too")
    assert (tmp_path / "out" / "weights").read_text() == "the only whole copy"
    assert not (tmp_path / ".out.building").exists()


@pytest.mark.parametrize("name", ["file", "/"])
def test_what_is_no_folder_is_not_replaced(name, tmp_path):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(InputError, match="no folder can be written here"), whole_folder(tmp_path / name):
        pass
    assert (tmp_path / "file").read_text() == "precious"


def test_the_card_says_how_the_model_was_made(tiny, tmp_path):
    model = replace(tiny, about={"made by": "Dpo", "em": 0.5, "each": "01" * 300, "note": "a | b\n# no heading"})
    export_model(model, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "library_name: transformers" in card
    assert "| made by | Dpo |" in card
    assert "| note | a \\| b # no heading |" in card
    assert "0101" not in card
