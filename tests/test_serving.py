"""From a checkpoint to a served model: trained by the entries, exported, and run in PyTorch as the same agent."""

import dataclasses
import json

import jax
import pytest
import torch
from chat_families import write_family
from peft import PeftModel
from small_jobs import one_world, small  # noqa: F401 - a fixture
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from configs import sft_synthhop
from jraggym.environment import transition, wants_retrieval
from jraggym.model_folder import load_model
from jraggym.models.decoder import DecoderConfig
from jraggym.models.lora import Lora
from jraggym.porting.pretrained import open_model
from jraggym.recipes.experiment import Devices
from jraggym.recipes.offline import train_sft
from jraggym.rollout import Policy, Rollout, Rules
from jraggym.sampling import Sampling
from jraggym.text.actions import parse_action
from jraggym.text.batching import Codec
from jraggym.text.rendering import render
from jraggym.training import Optimization
from jraggym.types import Malformed, Search, State
from train.export import Arguments, run
from train.job import prepare, run_experiment

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT reads it

QUESTIONS = 50
STEPS = Optimization(140, rate=6e-3, warmup=5)  # until half of the actions are well-formed


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A small actor of our own, trained until it writes actions, and its experiment."""
    out = tmp_path_factory.mktemp("serving") / "sft"
    experiment = small(sft_synthhop.EXPERIMENT, out, optimization=STEPS)
    settings = dataclasses.replace(
        experiment.settings, model=DecoderConfig(), tokens=1_500, short_first=70, test=QUESTIONS
    )
    experiment = dataclasses.replace(experiment, settings=settings)
    run_experiment(experiment, train_sft)
    return experiment


def torch_agent(model, tokenizer, retriever, question, max_turns):
    """The actions of an agent as one writes it with transformers alone, and what it was shown."""
    state, actions = State(question), []
    while not state.done:
        prompt = tokenizer("".join(render(state, max_turns)), add_special_tokens=False, return_tensors="pt")
        with torch.no_grad():
            ids = model.generate(**prompt, max_new_tokens=16)[0, prompt["input_ids"].shape[1] :]
        text = tokenizer.decode(ids)
        action = parse_action(text)
        documents = ()
        if isinstance(action, Search) and wants_retrieval(state, action, max_turns):
            documents = retriever([action.query])[0]
        actions.append(text)
        state = transition(state, action, documents, max_turns=max_turns)
    return actions


def test_the_exported_actor_takes_the_same_actions_in_torch(job, tmp_path):
    folder = tmp_path / "served"
    run(Arguments(model=job.out / "model", out=folder))
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ours = load_model(job.out / "model", "actor")
    settings = dataclasses.replace(job.settings, model=ours.config, seed=job.seed)
    shop = prepare(settings, "synthhop", None, job.out, lambda *_: None, ours.tokenizer)
    examples, turns = shop.task.test.examples[:QUESTIONS], settings.max_turns
    codec = Codec(ours.tokenizer, turns, 512)
    greedy = Sampling(candidates=1, max_tokens=16, temperature=0.0)
    rollout = Rollout(ours.config, codec, shop.test_retriever, greedy, Rules(max_turns=turns), batch=QUESTIONS)
    found = rollout.run(Policy(ours.config, ours.weights), examples, jax.random.key(0))
    assert len(found) == QUESTIONS
    same = 0
    for example, trajectory in zip(examples, found, strict=True):
        mine = [step.candidates[0].text for step in trajectory.steps]
        same += mine == torch_agent(model, tokenizer, shop.test_retriever, example.question, turns)
    assert same == QUESTIONS
    actions = [parse_action(step.candidates[0].text) for trajectory in found for step in trajectory.steps]
    formed = {str(action) for action in actions if not isinstance(action, Malformed)}
    assert len(formed) > QUESTIONS, (
        f"an agent that writes garbage agrees with any other: {len(formed)} different actions"
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A random chat model in a Llama's clothes, as a user's checkpoint comes."""
    folder = tmp_path_factory.mktemp("hub") / "llama"
    write_family("llama", folder)
    size = len(AutoTokenizer.from_pretrained(folder))
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    kept = {"max_position_embeddings": 2048, "bos_token_id": 1}
    values = LlamaConfig(vocab_size=8 * (-(-size // 8)), intermediate_size=64, **sizes, **kept)
    AutoModelForCausalLM.from_config(values, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def chat_job(checkpoint, out, **fields):
    experiment = small(sft_synthhop.EXPERIMENT, out, model=checkpoint, optimization=Optimization(3, 0.0, rate=1e-3))
    settings = dataclasses.replace(
        experiment.settings, max_prompt=1_200, edges=((1_200, 40),), tokens=2_600, max_action=24, demonstrations=24
    )
    return dataclasses.replace(experiment, settings=settings, **fields)


def test_a_checkpoint_is_trained_with_adapters_and_served(checkpoint, tmp_path):
    lora = Lora(rank=2, alpha=4.0)
    job = chat_job(checkpoint, tmp_path / "sft", lora=lora, devices=Devices(1, 2, 2))
    run_experiment(job, train_sft)
    before, after = open_model(checkpoint, "actor"), load_model(tmp_path / "sft" / "model", "actor")
    assert after.about["base"] == str(checkpoint)
    assert after.config == before.config
    assert not (before.weights.layers.q == after.weights.layers.q).all()

    run(Arguments(model=tmp_path / "sft" / "model", out=tmp_path / "full", dtype="bfloat16"))
    values = json.loads((tmp_path / "full" / "config.json").read_text())
    assert (values["max_position_embeddings"], values["bos_token_id"], values["dtype"]) == (2048, 1, "bfloat16")
    run(Arguments(model=tmp_path / "sft" / "model", out=tmp_path / "adapters", kind="adapters"))
    ids = torch.arange(3, 40)[None]
    base = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        plain = base(ids).logits
        served = PeftModel.from_pretrained(base, tmp_path / "adapters").eval()(ids).logits
        whole = AutoModelForCausalLM.from_pretrained(tmp_path / "full", dtype=torch.float32)(ids).logits
    assert (served - plain).abs().max() > 1e-4
    torch.testing.assert_close(served, whole, atol=0.05, rtol=0.05)  # the whole one was rounded to bfloat16
    merged = tmp_path / "merged"
    run(Arguments(model=checkpoint, out=merged, merge=tmp_path / "adapters"))
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(merged)(ids).logits
    torch.testing.assert_close(again, served, atol=1e-4, rtol=1e-4)
    talk = [{"role": "user", "content": "Where?"}]
    mine, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "full", checkpoint))
    assert mine.apply_chat_template(talk, return_dict=False) == theirs.apply_chat_template(talk, return_dict=False)
