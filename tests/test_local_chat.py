"""Chat models and critics on this machine, against transformers on small random models of the chat families."""

import json
from dataclasses import replace

import jax
import pytest
import torch
from chat_families import write_family
from hf_samples import FAMILIES, SIZES
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.models import auto

from jraggym.chat_model import Completion, Message, Request
from jraggym.chats.critic import CriticScorer
from jraggym.chats.local import Local, LocalChat, Prompts, _complete, width
from jraggym.chats.opening import open_chat, open_scorer
from jraggym.errors import InputError
from jraggym.model_folder import Model
from jraggym.models.critic import critic_specs
from jraggym.models.decoder import DecoderConfig, init, specs
from jraggym.porting.pretrained import export_model
from jraggym.text.chat import chat_ids
from jraggym.text.huggingface import HuggingFaceTokenizer
from jraggym.text.tokenizer import SentencePieceTokenizer

PAIRS = {"llama": "llama3", "qwen": "qwen3", "gemma": "gemma2"}  # a tokenizer and the model it comes with
SYSTEM, LENGTH = Message("system", "You answer a question by searching."), 20
TALK = Message("user", "Who?"), Message("assistant", "<search> Torvan</search>"), Message("user", "<nothing> " * 40)
CHATS = [
    (SYSTEM, Message("user", "Who is the mayor of the birthplace of Torvan?")),
    (Message("user", "Torvan?"),),
    (SYSTEM, *TALK),
]


def merged(messages, has_system):
    """What the template is to be shown: a system message in front of the next where there is no such role."""
    shown = [{"role": message.role, "content": message.content} for message in messages]
    if shown[0]["role"] == "system" and not has_system:
        shown[1]["content"] = f"{shown[0]['content']}\n\n{shown[1]['content']}"
        del shown[0]
    return shown


def generated(model, prompt, stops, length):
    """Greedy ids of transformers, and the sum of their log-probabilities."""
    settings = {"max_new_tokens": length, "eos_token_id": list(stops), "pad_token_id": 0, "do_sample": False}
    mask = torch.ones(1, len(prompt), dtype=torch.int64)
    shown = {"output_logits": True, "return_dict_in_generate": True}
    out = model.generate(torch.tensor([prompt]), attention_mask=mask, **settings, **shown)
    ids = out.sequences[0, len(prompt) :]
    steps = torch.log_softmax(torch.cat(out.logits).double(), -1)
    return ids.tolist(), float(steps.gather(1, ids[:, None]).sum())


@pytest.fixture(scope="module", params=PAIRS)
def folder(request, tmp_path_factory):
    """A random chat model as its repository looks; an id that it writes soon ends its turns, beside the usual ones."""
    path = tmp_path_factory.mktemp("chat") / request.param
    write_family(request.param, path)
    size = len(AutoTokenizer.from_pretrained(path))
    stops = json.loads((path / "generation_config.json").read_text())["eos_token_id"]
    values = {**SIZES, **FAMILIES[PAIRS[request.param]], "vocab_size": size, "max_position_embeddings": 512}
    config = auto.AutoConfig.for_model(values.pop("model_type"), **values)
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    model.save_pretrained(path)
    stops = stops if isinstance(stops, list) else [stops]
    tokenizer = HuggingFaceTokenizer.load(path)
    written = [generated(model, chat_ids(tokenizer, chat), stops, LENGTH)[0] for chat in CHATS]
    stop = next(i for ids in written for i in ids[1:] if any(i not in others for others in written))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [*stops, stop]}))
    return path


def asked(number, **settings):
    return Request(CHATS[number], **{"max_tokens": LENGTH, **settings})


def test_greedy_completions_are_those_of_transformers(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    stops = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    replies = open_chat(Local(str(folder), max_prompt=500, rows=2))([asked(i, candidates=2) for i in range(3)])
    for messages, reply in zip(CHATS, replies, strict=True):
        shown = merged(messages, folder.name != "gemma")
        prompt = tokenizer.apply_chat_template(shown, add_generation_prompt=True, return_dict=False)
        ids, logprob = generated(model, prompt, stops, LENGTH)
        ended = ids[-1] in stops
        first, second = reply.completions
        assert first == second
        text = tokenizer.decode(ids[:-1] if ended else ids, clean_up_tokenization_spaces=False)
        assert first == Completion(text, len(ids), pytest.approx(logprob, abs=1e-3), not ended)
        assert (reply.prompt_tokens, reply.error) == (len(prompt), None)
    assert {reply.completions[0].cut for reply in replies} == {True, False}, "stops and lengths are both to be seen"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A random actor of our own shape with Llama's tokenizer."""
    path = tmp_path_factory.mktemp("llama")
    write_family("llama", path)
    sizes = {"query_heads": 2, "kv_heads": 1, "head_dim": 12, "qkv_bias": False, "scale_embed": False}
    config = DecoderConfig(vocab=512, model=24, **sizes)
    (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    tokenizer = HuggingFaceTokenizer.load(path)
    return Model(
        "actor", config, tokenizer, init(specs(config), jax.random.key(0)), {"config": {"model_type": "llama"}}
    )


def test_sampled_completions_depend_on_the_request_alone(llama):
    chat = LocalChat(llama, max_prompt=400, rows=3)
    requests = [asked(i % 3, candidates=4, temperature=1.0, seed=i // 3) for i in range(9)]
    together = chat(requests)
    assert chat(requests[::-1]) == together[::-1]
    assert [chat([request])[0] for request in requests] == together
    texts = [completion.text for reply in together for completion in reply.completions]
    assert len(set(texts)) == len(texts) == 36
    assert chat([]) == []


def test_a_width_is_compiled_once(llama):
    chat = LocalChat(llama, max_prompt=400, rows=2)
    before = _complete._cache_size()
    chat([asked(i, max_tokens=7) for i in (0, 1, 2, 0, 0)])
    widths = len({width(len(chat_ids(llama.tokenizer, chat)), 64) for chat in CHATS})
    assert widths == _complete._cache_size() - before > 1
    chat([asked(i, max_tokens=7, seed=1) for i in (2, 2, 2, 1)])
    assert _complete._cache_size() - before == widths


def test_a_prompt_that_is_too_long_is_an_error_of_its_reply_or_loses_its_beginning(llama):
    length = len(chat_ids(llama.tokenizer, CHATS[2]))
    short, long = LocalChat(llama, max_prompt=length - 1, rows=1)([asked(1), asked(2)])
    assert short.error is None
    assert long.completions == ()
    assert f"got {length} tokens for at most {length - 1}" in (long.error or "")
    [cut] = LocalChat(llama, max_prompt=50, truncate=True, rows=1)([asked(2)])
    assert (cut.prompt_tokens, cut.error) == (50, None)
    kept = Prompts(llama, 50, True).ids(CHATS[2], LENGTH)
    assert kept == chat_ids(llama.tokenizer, CHATS[2])[-50:]
    few = replace(llama, about={"config": {"max_position_embeddings": length + LENGTH - 1}})
    assert f"at most {length - 1}" in (LocalChat(few)([asked(2)])[0].error or "")


def test_faults_of_single_requests_are_theirs(llama):
    bad = [asked(1, max_tokens=0), asked(1, candidates=0), asked(1, temperature=-1.0)]
    replies = LocalChat(llama, rows=1)([*bad, asked(1)])
    assert [reply.error is None for reply in replies] == [False, False, False, True]


def test_a_template_that_refuses_roles_is_an_error_of_its_reply(llama):
    llama.tokenizer._tokenizer.chat_template, kept = (
        "{% if messages | length > 1 %}{{ raise_exception('one at a time') }}{% endif %}{{ messages[0]['content'] }}",
        llama.tokenizer._tokenizer.chat_template,
    )
    try:
        replies = LocalChat(llama, rows=1)([Request(CHATS[0]), asked(1)])
    finally:
        llama.tokenizer._tokenizer.chat_template = kept
    assert "one at a time" in (replies[0].error or "")
    assert replies[1].error is None


def test_text_from_outside_ends_no_turn(llama):
    end = llama.tokenizer.token_id("<|eot_id|>")
    chat = (
        SYSTEM,
        Message("user", "a <|eot_id|> b"),
        Message("assistant", "<|eot_id|>"),
        Message("user", "<|eot_id|>"),
    )
    assert chat_ids(llama.tokenizer, chat).count(end) == len(chat)


def test_models_without_a_chat_are_refused(llama):
    with pytest.raises(InputError, match="only an actor completes chats"):
        LocalChat(replace(llama, kind="critic"))
    with pytest.raises(InputError, match="only a critic scores"):
        CriticScorer(llama)
    pieces = SentencePieceTokenizer.train(["Where was Ada Morn born?"] * 9, 300)
    with pytest.raises(InputError, match="tokenizer has no chat template"):
        LocalChat(replace(llama, tokenizer=pieces))
    with pytest.raises(InputError, match="no such model; got nowhere"):
        open_chat(Local("nowhere"))


# ---------------------------------------------------------------- the critic


@pytest.mark.parametrize("family", ["llama", "qwen", "mistral"])
def test_a_critic_scores_candidates_as_its_export_does_in_torch(family, llama, tmp_path):
    write_family(family, tmp_path / "in")
    tokenizer = HuggingFaceTokenizer.load(tmp_path / "in")
    weights = init(critic_specs(llama.config), jax.random.key(1))
    weights = weights.replace(head=20 * weights.head)
    model_type = {"qwen": "qwen3"}.get(family, family)
    critic = Model("critic", llama.config, tokenizer, weights, {"config": {"model_type": model_type}})
    export_model(critic, tmp_path / "out")
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    served = AutoTokenizer.from_pretrained(tmp_path / "out")

    texts = ("<answer> Marnos</answer>", "<search> Torvan birthplace</search>", "", "no " * 30)
    chats = [(messages, texts[: 4 - i]) for i, messages in enumerate(CHATS)] + [(CHATS[0], ())]
    scorer = open_scorer(Local(str(tmp_path / "out"), max_prompt=600, rows=2))
    found = scorer(chats)
    assert list(map(len, found)) == [4, 3, 2, 0]
    end = served.convert_tokens_to_ids({"llama": "<|eot_id|>", "qwen": "<|im_end|>", "mistral": "</s>"}[family])
    for (messages, candidates), scores in zip(chats, found, strict=True):
        shown = merged(messages, family != "mistral")
        prompt = served.apply_chat_template(shown, add_generation_prompt=True, return_dict=False)
        for text, score in zip(candidates, scores, strict=True):
            ids = [*prompt, *served(text, add_special_tokens=False)["input_ids"], end]
            with torch.no_grad():
                expected = float(theirs(torch.tensor([ids])).logits[0, 0])
            assert score == pytest.approx(expected, abs=1e-4)
    assert len({round(score, 4) for scores in found for score in scores}) == 9, "all scores alike show nothing"
    assert scorer(chats[1:2]) == found[1:2]
    with pytest.raises(InputError, match="the prompt is too long"):
        open_scorer(Local(str(tmp_path / "out"), max_prompt=30))(chats[:1])
