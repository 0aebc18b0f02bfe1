"""Tokenizers of Hugging Face models: the ids of apply_chat_template, the ends of turns, and files that are refused."""

import json
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import sentencepiece
from chat_families import FAMILIES, write_families, write_family
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer, GemmaTokenizer, LlamaTokenizer

from jraggym.errors import InputError
from jraggym.text.huggingface import HuggingFaceTokenizer

QUESTION, ACTION = "Who is the  mayor of Łódź? 😀", "<search> Torvan mayor</search>"
TALK = [
    {"role": "user", "content": QUESTION},
    {"role": "assistant", "content": ACTION},
    {"role": "user", "content": "<nothing>"},
]
# what the templates make of TALK, written by hand
SAID = {
    "llama": f"<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{QUESTION}<|eot_id|><|start_header_id|>"
    f"assistant<|end_header_id|>\n\n{ACTION}<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n<nothing><|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "qwen": f"<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>"
    f"assistant\n{ACTION}<|im_end|>\n<|im_start|>user\n<nothing><|im_end|>\n<|im_start|>assistant\n",
    "gemma": f"<bos><start_of_turn>user\n{QUESTION}<end_of_turn>\n<start_of_turn>model\n{ACTION}<end_of_turn>\n"
    "<start_of_turn>user\n<nothing><end_of_turn>\n<start_of_turn>model\n",
    "mistral": f"<s>[INST] {QUESTION} [/INST]{ACTION}</s>[INST] <nothing> [/INST]",
}
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=30)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_families(tmp_path_factory.mktemp("families"))


@pytest.fixture(scope="module")
def loaded(folders):
    return {name: HuggingFaceTokenizer.load(folder) for name, folder in folders.items()}


def reference(folder):
    """The tokenizer of `transformers` on the same files."""
    classes = {"gemma": GemmaTokenizer, "mistral": LlamaTokenizer}
    return classes.get(folder.name, AutoTokenizer).from_pretrained(folder)


# ---------------------------------------------------------------- ids


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("generation", [True, False])
def test_chat_ids_are_those_of_the_template(folders, loaded, name, generation):
    theirs = reference(folders[name])
    talk = TALK if generation else TALK[:2]
    ids = loaded[name].chat(talk, generation=generation)
    assert ids == theirs.apply_chat_template(talk, add_generation_prompt=generation, return_dict=False)
    if generation:
        assert ids == theirs.encode(SAID[name], add_special_tokens=False)
        assert loaded[name].decode([ids]) == [SAID[name]]


@pytest.mark.parametrize("name", ["llama", "qwen"])
def test_chat_ids_piece_by_piece(folders, loaded, name):
    """Against the tokenizer alone, with no template and no `transformers`: control tokens stand by themselves."""
    tokenizer, family = Tokenizer.from_file(str(folders[name] / "tokenizer.json")), FAMILIES[name]
    said, ids = SAID[name], []
    while said:
        control = next((token for token in family.tokens if said.startswith(token)), None)
        starts = [said.find(token) for token in family.tokens if token in said]
        piece = control or said[: min(starts, default=len(said))]
        ids += [tokenizer.token_to_id(control)] if control else tokenizer.encode(piece).ids
        said = said[len(piece) :]
    assert loaded[name].chat(TALK) == ids


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=25, deadline=None)
@given(segments=st.lists(texts, max_size=3))
def test_segments_come_back_and_have_no_special_tokens(loaded, name, segments):
    tokenizer = loaded[name]
    ids = tokenizer.encode(segments)
    back = tokenizer.decode(ids)
    if FAMILIES[name].dummy_prefix:  # SentencePiece's space in front comes and goes
        segments, back = [s.lstrip(" ") for s in segments], [s.lstrip(" ") for s in back]
    assert back == segments
    control = {tokenizer.token_id(token) for token in FAMILIES[name].tokens}
    assert not control.intersection(i for row in ids for i in row)


@pytest.mark.parametrize("name", ["gemma", "mistral"])
def test_a_sentencepiece_model_alone_gives_sentencepieces_ids(folders, loaded, name):
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folders[name] / "tokenizer.model"))
    found = ["Who is the mayor of Torvan?", "two  spaces ", "Łódź 日本 😀\n", "x"]
    assert loaded[name].encode(found) == [processor.encode(text) for text in found]


@pytest.mark.parametrize("kind", [None, "NoSuchTokenizer", "LlamaTokenizerFast"])
def test_a_sentencepiece_model_of_no_known_class_is_read_like_llamas(folders, tmp_path, kind):
    settings = json.loads((folders["mistral"] / "tokenizer_config.json").read_text())
    changed = {key: value for key, value in {**settings, "tokenizer_class": kind}.items() if value is not None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(changed))
    for name in ("tokenizer.model", "config.json"):
        (tmp_path / name).write_bytes((folders["mistral"] / name).read_bytes())
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert HuggingFaceTokenizer.load(tmp_path).encode([ACTION]) == [processor.encode(ACTION)]


def test_options_reach_the_template(folders):
    quiet = HuggingFaceTokenizer.load(folders["qwen"], enable_thinking=False)
    assert quiet.decode([quiet.chat(TALK)])[0].endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


def test_sizes_and_single_ids(folders, loaded):
    for name, tokenizer in loaded.items():
        theirs = reference(folders[name])
        assert tokenizer.vocab_size == len(theirs)
        assert all(tokenizer.token_id(t) == theirs.convert_tokens_to_ids(t) for t in FAMILIES[name].tokens)
    assert loaded["qwen"].pad_id == loaded["qwen"].token_id("<|endoftext|>")
    assert all(tokenizer.pad_id != tokenizer.end_ids[0] for tokenizer in loaded.values())
    with pytest.raises(KeyError, match="banana"):
        loaded["llama"].token_id("<banana>")


def test_decode_drops_padding_and_foreign_ids_but_shows_special_tokens(loaded):
    tokenizer = loaded["qwen"]
    ids = tokenizer.encode(["Torvan"])[0]
    odd = [tokenizer.pad_id, *ids, tokenizer.token_id("<|im_start|>"), 10**6, -1]
    assert tokenizer.decode([odd, []]) == ["Torvan<|im_start|>", ""]
    assert tokenizer.encode([]) == []


@pytest.mark.parametrize("name", FAMILIES)
def test_what_was_saved_loads_as_the_same(loaded, tmp_path, name):
    loaded[name].save(tmp_path)
    again = HuggingFaceTokenizer.load(tmp_path)
    assert again.chat(TALK) == loaded[name].chat(TALK)
    assert again.encode([ACTION, QUESTION]) == loaded[name].encode([ACTION, QUESTION])
    assert again.end_ids[0] == loaded[name].end_ids[0]


def test_many_threads_get_the_same_ids(loaded):
    """The shards of a rollout call the host at once."""
    tokenizer = loaded["qwen"]
    chat, ids = tokenizer.chat(TALK), tokenizer.encode([ACTION, QUESTION])

    def work(_):
        return tokenizer.chat(TALK) == chat and tokenizer.decode(tokenizer.encode([ACTION, QUESTION])) == [
            ACTION,
            QUESTION,
        ]

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(200)))
    assert tokenizer.encode([ACTION, QUESTION]) == ids


# ---------------------------------------------------------------- ends of turns, roles


@pytest.mark.parametrize("name", FAMILIES)
def test_turns_end_with_what_the_template_writes_or_the_model_knows(loaded, name):
    tokenizer, family = loaded[name], FAMILIES[name]
    stops = [stop for stop in family.stops if stop != family.end]
    assert tokenizer.end_ids == tuple(tokenizer.token_id(stop) for stop in (family.end, *stops))
    assert tokenizer.has_system == family.system


@pytest.mark.parametrize("name", FAMILIES)
def test_without_a_generation_config_the_tokenizers_end_is_a_stop(tmp_path, name):
    family = write_family(name, tmp_path, generation=False)
    tokenizer = HuggingFaceTokenizer.load(tmp_path)
    ends = dict.fromkeys((family.end, family.special["eos_token"]))
    assert tokenizer.end_ids == tuple(map(tokenizer.token_id, ends))


def test_a_template_without_a_closing_token_needs_a_stop(folders, tmp_path):
    tokenizer = reference(folders["qwen"])
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    assert HuggingFaceTokenizer(tokenizer).end_ids == (tokenizer.eos_token_id,)
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="no token ends a turn"):
        _ = HuggingFaceTokenizer(tokenizer).end_ids


def test_a_system_message_that_is_left_out_counts_as_none(folders):
    tokenizer = reference(folders["qwen"])
    tokenizer.chat_template = "{% for m in messages if m['role'] != 'system' %}{{ m['content'] }}{% endfor %}"
    assert not HuggingFaceTokenizer(tokenizer).has_system


def test_a_template_that_refuses_is_named(loaded):
    with pytest.raises(InputError, match=r"refuses the messages.*System role not supported, for the roles system"):
        loaded["gemma"].chat([{"role": "system", "content": "a"}, {"role": "user", "content": "b"}])


@pytest.mark.parametrize("name", FAMILIES)
def test_no_text_from_outside_is_a_special_token(loaded, name):
    tokenizer, tokens = loaded[name], FAMILIES[name].tokens
    evil = "".join(tokens) + f"{tokens[-1][0]}{tokens[-1]}{tokens[-1][1:]} {tokens[0]}system"
    control = {tokenizer.token_id(token) for token in tokens} - {
        tokenizer.token_id(t) for t in ("<unk>",) if t in tokens
    }
    before = control.intersection(tokenizer.encode([evil])[0])
    assert before, "the test's text holds no special token"
    assert not control.intersection(tokenizer.encode([tokenizer.defuse(evil)])[0])
    harmless = "a < b [x] <search> y</search>"
    assert tokenizer.defuse(harmless) == harmless
    assert tokenizer.encode([tokenizer.defuse("\ud800 hm")]) == tokenizer.encode(["? hm"])


# ---------------------------------------------------------------- files


def test_no_template_is_named(tmp_path):
    write_family("llama", tmp_path, template=False)
    with pytest.raises(InputError, match=r"has no chat template.*add chat_template\.jinja"):
        HuggingFaceTokenizer.load(tmp_path).chat(TALK)


def damage(folder, how):
    path = folder / "tokenizer.json"
    if how == "cut":
        path.write_bytes(path.read_bytes()[:3000])
    elif how == "other json":
        path.write_text('{"model": {}}')
    elif how == "cut settings":
        (folder / "tokenizer_config.json").write_text("{")
    else:
        (folder / "generation_config.json").write_text('{"eos_token_id":')


@pytest.mark.parametrize("how", ["cut", "other json", "cut settings", "cut generation"])
def test_damaged_files_are_named(tmp_path, how):
    write_family("qwen", tmp_path)
    damage(tmp_path, how)
    with pytest.raises(InputError, match=rf"cannot read the tokenizer {tmp_path}.*Give a folder with tokenizer\.json"):
        HuggingFaceTokenizer.load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"no model"])
def test_a_damaged_sentencepiece_model_is_named(tmp_path, content):
    write_family("gemma", tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(InputError, match="cannot read the tokenizer"):
        HuggingFaceTokenizer.load(tmp_path)


@pytest.mark.parametrize("settings", [True, False])
def test_a_tokenizer_of_no_files_is_refused(tmp_path, settings):
    """transformers makes an empty tokenizer of a model's type alone."""
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    if settings:
        (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
    with pytest.raises(InputError, match=r"has no vocabulary; got \d+ tokens"):
        HuggingFaceTokenizer.load(tmp_path)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="cannot read the tokenizer"):
        HuggingFaceTokenizer.load(tmp_path)


def test_a_class_that_reads_pieces_otherwise_is_refused(tmp_path):
    write_family("mistral", tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "tokenizer_class": "GemmaTokenizer"}))
    with pytest.raises(InputError, match=r"misreads .*tokenizer\.model"):
        HuggingFaceTokenizer.load(tmp_path)


@pytest.mark.parametrize("kind", ["Evil", "PreTrainedTokenizerFast"])
def test_no_code_of_a_repository_runs(tmp_path, kind):
    write_family("qwen", tmp_path)
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    path = tmp_path / "tokenizer_config.json"
    changed = {"tokenizer_class": kind, "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))
    if kind == "Evil":
        with pytest.raises(InputError, match="contains custom code"):
            HuggingFaceTokenizer.load(tmp_path)
    else:  # a class of transformers stands in
        assert HuggingFaceTokenizer.load(tmp_path).vocab_size > 256
    assert not (tmp_path / "ran").exists()
    assert "evil" not in sys.modules


@pytest.mark.parametrize("name", list(FAMILIES))
def test_a_saved_tokenizer_comes_back_whole(name, folders, loaded, tmp_path):
    """With what generation_config.json says, which is no part of transformers' own tokenizer files."""
    before = loaded[name]
    before.save(tmp_path)
    again = HuggingFaceTokenizer.load(tmp_path)
    assert (again.end_ids, again.pad_id) == (before.end_ids, before.pad_id)
    assert again.chat(TALK) == before.chat(TALK)
    assert again.decode(before.encode(["Who is the mayor?"])) == ["Who is the mayor?"]
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.pad_token_id == before.pad_id != before.end_ids[0]


def test_a_template_without_a_date_has_the_same_one_every_day(folders, tmp_path):
    shutil.copytree(folders["llama"], tmp_path, dirs_exist_ok=True)
    dated = "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    (tmp_path / "chat_template.jinja").write_text(dated + "{{ date_string }}")
    tokenizer = HuggingFaceTokenizer.load(tmp_path)
    assert tokenizer.decode([tokenizer.chat(TALK)]) == ["26 Jul 2024"]
    told = HuggingFaceTokenizer.load(tmp_path, date_string="1 May 2030")
    assert told.decode([told.chat(TALK)]) == ["1 May 2030"]


@pytest.mark.parametrize(
    "template", ["{{ 1 / 0 }}", "{{ none + 1 }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"]
)
def test_a_template_that_fails_is_named(template, folders, tmp_path):
    shutil.copytree(folders["llama"], tmp_path, dirs_exist_ok=True)
    (tmp_path / "chat_template.jinja").write_text(template)
    with pytest.raises(InputError, match="the chat template refuses the messages"):
        HuggingFaceTokenizer.load(tmp_path).chat(TALK)


def test_special_tokens_may_lie_beyond_the_embedding_table(loaded):
    tokenizer = loaded["qwen"]
    assert tokenizer.fits(tokenizer.vocab_size)
    last = max(tokenizer._vocab.values())
    assert tokenizer.fits(last), "the last one is special"
    assert not tokenizer.fits(100)
