"""The entries of single stages, one after the other on a tiny world, and what they say to bad input."""

import json
from dataclasses import replace

import numpy as np
import pytest
import tyro
from array_samples import worst_difference
from small_jobs import FEW, MODEL, one_world, small  # noqa: F401 - a fixture

import train.critic
import train.grpo
import train.job
from configs import (
    collect_synthhop,
    critic_synthhop,
    dpo_synthhop,
    grpo_synthhop,
    grpo_synthhop_outcome,
    ppo_synthhop,
    ppo_synthhop_critic,
    sft_synthhop,
)
from jraggym.data.process import build_dataset, open_dataset
from jraggym.errors import InputError
from jraggym.model_folder import load_model
from jraggym.models.lora import Lora
from jraggym.onpolicy import Schedule
from jraggym.recipes.collecting import collect_data
from jraggym.recipes.experiment import Devices, Experiment
from jraggym.recipes.offline import train_critic_model, train_dpo, train_sft
from jraggym.recipes.online import Curve, train_sampled
from jraggym.training import Optimization
from jraggym.types import Candidate
from train.job import run_experiment


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("stages")


@pytest.fixture(scope="module")
def warm(root):
    """A warm start of a few steps."""
    optimization = Optimization(8, rate=6e-3, warmup=2)
    found = run_experiment(small(sft_synthhop.EXPERIMENT, root / "sft", optimization=optimization), train_sft)
    assert set(found) >= {"em", "em_interval", "f1", "searches", "seed", "stages"}
    return root / "sft" / "model"


@pytest.fixture(scope="module")
def data(root, warm):
    found = run_experiment(small(collect_synthhop.EXPERIMENT, root / "collect", model=warm, questions=16), collect_data)
    assert found["states"] >= 16
    assert found["candidates"] == 4 * found["states"]
    assert found["candidates"] < found["sampled_tokens"] <= 16 * found["candidates"]
    # So small an actor writes no good action: the states are its own, the candidates are made.
    actions = ("<search> mayor</search>", "<answer> yes</answer>", "<answer> no</answer>", "<search> town</search>")
    candidates = tuple(Candidate(text, 1 / (1 + rank)) for rank, text in enumerate(actions))
    records = [replace(record, candidates=candidates, f1=1.0) for record in open_dataset(found["data"])]
    build_dataset(root / "labelled", records)
    return root / "labelled"


def test_a_model_folder_gives_back_the_model(warm):
    model = load_model(warm, "actor")
    assert replace(model.config, vocab=MODEL.vocab) == MODEL
    assert model.tokenizer.vocab_size == model.config.vocab
    assert model.about["questions"] == 6
    with pytest.raises(InputError, match="holds no critic; got actor"):
        load_model(warm, "critic")


def test_dpo_with_a_kept_reference_equals_dpo_with_a_computed_one(root, warm, data):
    weights = []
    for keep in (True, False):
        out = root / f"dpo-{keep}"
        run_experiment(
            small(dpo_synthhop.EXPERIMENT, out, model=warm, data=data, optimization=FEW, keep_reference=keep), train_dpo
        )
        weights.append(load_model(out / "model", "actor").weights)
        assert len(list(out.glob("reference-*.npy"))) == keep
        assert list((out / "tensorboard").glob("events*"))
    assert worst_difference(*weights) < 1e-4
    assert worst_difference(weights[0], load_model(warm, "actor").weights) > 1e-4


def test_adapters_on_a_mesh_leave_other_leaves_alone(root, warm, data):
    out, lora = root / "dpo-lora", Lora(rank=2)
    fields = {"lora": lora, "devices": Devices(2, 1, 1), "parts": 1, "optimization": FEW}
    run_experiment(small(dpo_synthhop.EXPERIMENT, out, model=warm, data=data, **fields), train_dpo)
    before, after = (load_model(folder, "actor").weights for folder in (warm, out / "model"))
    assert worst_difference(before.layers.q, after.layers.q) > 1e-6
    assert worst_difference(before.layers.up, after.layers.up) == 0.0
    assert worst_difference(before.embed, after.embed) == 0.0


def test_critic_and_ppo_on_its_scores(root, warm, data):
    found = run_experiment(
        small(critic_synthhop.EXPERIMENT, root / "critic", model=warm, data=data, optimization=FEW), train_critic_model
    )
    assert found["pairs"] > 0
    assert 0 <= found["accuracy"] <= 1
    assert 0 <= found["calibration_error"] <= 1
    critic = root / "critic" / "model"
    schedule = Schedule(iterations=2, updates=1, rows=4, prompt=144, action=16, candidates=4)
    fields = {"model": warm, "critic": critic, "questions": 4, "slots": 4, "schedule": schedule, "every": 1}
    found = run_experiment(small(ppo_synthhop_critic.EXPERIMENT, root / "ppo", **fields), train_sampled)
    assert [point["iteration"] for point in found["curve"]] == [0, 1, 2]
    assert load_model(root / "ppo" / "model", "actor").about["iteration"] == 2


@pytest.mark.parametrize("name", ["outcome", "steps"])
def test_whole_episodes(root, warm, name):
    start = grpo_synthhop_outcome.EXPERIMENT if name == "outcome" else ppo_synthhop.EXPERIMENT
    schedule = Schedule(iterations=2, updates=1, rows=2, prompt=40, action=168, candidates=2)
    fields = {"model": warm, "questions": 2, "slots": 4, "schedule": schedule, "rewards": name, "every": 2}
    found = run_experiment(small(start, root / name, **fields), train_sampled)
    tokens = [point["sampled_tokens"] for point in found["curve"]]
    assert tokens[0] == 0
    assert tokens[1] > 0
    assert [len(point["each"]) for point in found["curve"]] == [6, 6]
    again = run_experiment(small(start, root / name, **fields), train_sampled)
    assert again["curve"] == found["curve"], "a finished run has nothing left to do"


def test_the_same_folder_refuses_other_settings(root, warm, data):
    with pytest.raises(InputError, match=r"holds a job of other settings; got .* differs in optimization.rate"):
        run_experiment(
            small(
                dpo_synthhop.EXPERIMENT,
                root / "dpo-True",
                model=warm,
                data=data,
                optimization=replace(FEW, rate=1.0),
            ),
            train_dpo,
        )


def test_a_curve_keeps_one_point_for_an_iteration(tmp_path):
    curve = Curve(tmp_path / "curve.jsonl")
    for iteration, em in ((0, 0.1), (4, 0.2), (8, 0.3), (4, 0.25)):
        curve.put({"iteration": iteration, "em": em, "sampled_tokens": 10.0 * iteration})
    assert [(p["iteration"], p["em"]) for p in curve.points()] == [(0, 0.1), (4, 0.25), (8, 0.3)]


# ---------------------------------------------------------------- bad input


def call(main, monkeypatch, capsys, *words):
    monkeypatch.setattr("sys.argv", ["entry", *words])
    with pytest.raises(SystemExit) as exit_:
        main()
    return exit_.value.code, capsys.readouterr().err


def test_a_misspelt_field_is_refused_with_the_nearest_name(monkeypatch, capsys, tmp_path):
    code, told = call(train.grpo.main, monkeypatch, capsys, "synthhop", "--schedule.iteration", "3")
    assert code == 2
    assert "--schedule.iterations" in told


@pytest.mark.parametrize(
    ("experiment", "words", "read"),
    [
        (grpo_synthhop.EXPERIMENT, ("--lora.rank", "4"), lambda e: e.lora.rank == 4),
        (dpo_synthhop.EXPERIMENT, ("--lora.leaves", "q", "v"), lambda e: e.lora.leaves == ("q", "v")),
        (grpo_synthhop.EXPERIMENT, ("--algorithm.loss.kl-weight", "0.1"), lambda e: e.algorithm.loss.kl_weight == 0.1),
        (ppo_synthhop.EXPERIMENT, ("--algorithm.adaptive.target", "2"), lambda e: e.algorithm.adaptive.target == 2),
        (sft_synthhop.EXPERIMENT, ("--devices.fsdp", "4"), lambda e: e.devices.fsdp == 4),
    ],
)
def test_nested_fields_are_overridden_on_the_command_line(experiment, words, read):
    experiments = {"one": ("", experiment), "other": ("", experiment)}
    assert read(tyro.extras.overridable_config_cli(experiments, args=["one", *words]))


def test_a_missing_model_is_one_line(monkeypatch, capsys, tmp_path):
    words = ("synthhop", "--model", str(tmp_path / "none"), "--out", str(tmp_path / "out"))
    code, told = call(train.grpo.main, monkeypatch, capsys, *words)
    assert code == 2
    assert "no such model" in told
    assert "Traceback" not in told


def test_missing_data_is_one_line(monkeypatch, capsys, warm, tmp_path):
    words = ("synthhop", "--model", str(warm), "--data", str(tmp_path), "--out", str(tmp_path / "out"))
    more = ("--settings.demonstrations", "300", "--settings.collected", "20")
    code, told = call(train.critic.main, monkeypatch, capsys, *words, *more)
    assert code == 2
    assert "no process data in" in told


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rewards": "praise"}, "unknown rewards; got praise"),
        ({"rewards": "critic"}, "a critic goes with rewards=critic"),
    ],
)
def test_rewards_that_do_not_fit_are_refused(fields, message, warm, tmp_path):
    with pytest.raises(InputError, match=message):
        run_experiment(small(grpo_synthhop.EXPERIMENT, tmp_path, model=warm, **fields), train_sampled)


def test_an_unknown_split_is_refused(tmp_path):
    with pytest.raises(InputError, match="unknown split; got exam"):
        Experiment(tmp_path, evaluate="exam")


@pytest.mark.parametrize("damage", ["{", "{}", '{"kind": "actor", "config": {"vocabulary": 3}}'])
def test_a_damaged_model_is_refused(tmp_path, damage):
    (tmp_path / "model.json").write_text(damage)
    with pytest.raises(InputError, match="no model in"):
        load_model(tmp_path, "actor")


def test_results_are_plain_json(root, warm):
    found = json.loads((root / "sft" / "results.json").read_text())
    assert np.isfinite(found["em"])
    assert found["experiment"] == "SFT"
