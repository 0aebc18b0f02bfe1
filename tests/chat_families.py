"""Small tokenizers with the features of the chat families, as folders that their repositories look like.

llama and qwen ship tokenizer.json (byte-level pairs), gemma and mistral only SentencePiece's tokenizer.model.
"""

import io
import json
from dataclasses import dataclass

import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

TEXTS = [
    "You answer a question by searching a collection of documents. Reply with exactly one action and nothing else.",
    "<question> Who is the mayor of the birthplace of Torvan?<search> Torvan birthplace</search><nothing><malformed>",
    "<document> Torvan | Torvan is a person with birthplace Bexlis.<answer> Marnos</answer><finish>",
    "<think> birthplace Bexlis</think> system user model assistant",
]
LLAMA_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


LLAMA = """{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>

{{ m['content'] | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}\
<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""

QWEN = """{% if messages[0]['role'] != 'system' %}<|im_start|>system
You are helpful.<|im_end|>
{% endif %}{% for m in messages %}<|im_start|>{{ m['role'] }}
{{ m['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% endif %}{% endif %}"""

GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}\
{% endif %}{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}
{{ m['content'] | trim }}<end_of_turn>
{% endfor %}{% if add_generation_prompt %}<start_of_turn>model
{% endif %}"""

MISTRAL = """{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate user/assistant/...') }}{% endif %}{% if m['role'] == 'user' %}\
[INST] {{ m['content'] }} [/INST]{% else %}{{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"""


@dataclass(frozen=True)
class Family:
    """A family's files, and what is to be seen of them."""

    template: str
    special: dict[str, str]  # of tokenizer_config.json
    tokens: tuple[str, ...]  # control tokens, in the order of their ids
    stops: tuple[str, ...]  # of generation_config.json
    end: str  # what ends a turn in the template
    system: bool
    kind: str = "PreTrainedTokenizerFast"
    model_type: str = ""
    dummy_prefix: bool = False

    @property
    def pieces_only(self) -> bool:
        return self.kind != "PreTrainedTokenizerFast"


FAMILIES = {
    "llama": Family(
        LLAMA,
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"},
        ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        ("<|end_of_text|>", "<|eot_id|>"),
        "<|eot_id|>",
        system=True,
    ),
    "qwen": Family(
        QWEN,
        {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        ("<|im_end|>", "<|endoftext|>"),
        "<|im_end|>",
        system=True,
    ),
    "gemma": Family(
        GEMMA,
        {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"},
        ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"),
        ("<eos>", "<end_of_turn>"),
        "<end_of_turn>",
        system=False,
        kind="GemmaTokenizer",
        model_type="gemma2",
    ),
    "mistral": Family(
        MISTRAL,
        {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
        ("<unk>", "<s>", "</s>"),
        ("</s>",),
        "</s>",
        system=False,
        kind="LlamaTokenizer",
        model_type="mistral",
        dummy_prefix=True,
    ),
}


def write_families(root):
    """A folder for each family in `root`, by name."""
    for name in FAMILIES:
        write_family(name, root / name)
    return {name: root / name for name in FAMILIES}


def write_family(name, folder, *, template=True, generation=True):
    """Writes the files of a family into `folder`, and returns the family."""
    family = FAMILIES[name]
    folder.mkdir(parents=True, exist_ok=True)
    (_write_pieces if family.pieces_only else _write_fast)(family, folder)
    settings = {"tokenizer_class": family.kind, **family.special}
    if template:
        settings["chat_template"] = family.template
    if family.pieces_only:
        settings["extra_special_tokens"] = [t for t in family.tokens if t not in family.special.values()]
        (folder / "config.json").write_text(json.dumps({"model_type": family.model_type}))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if generation:
        ids = [family.tokens.index(stop) for stop in family.stops]
        if not family.pieces_only:
            ids = [_fast_id(folder, stop) for stop in family.stops]
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids[0] if len(ids) == 1 else ids}))
    return family


def _fast_id(folder, token):
    return Tokenizer.from_file(str(folder / "tokenizer.json")).token_to_id(token)


def _write_fast(family, folder):
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(LLAMA_SPLIT), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in family.tokens])
    tokenizer.save(str(folder / "tokenizer.json"))


def _write_pieces(family, folder):
    model = io.BytesIO()
    names = {f"{kind}_piece": family.special.get(f"{kind}_token", "") for kind in ("pad", "eos", "bos", "unk")}
    ids = {f"{key[:3]}_id": family.tokens.index(piece) if piece else -1 for key, piece in names.items()}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 3),
        model_writer=model,
        vocab_size=400,
        model_type="bpe",
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=family.dummy_prefix,
        remove_extra_whitespaces=False,
        user_defined_symbols=[token for token in family.tokens if token not in family.special.values()],
        minloglevel=2,
        **ids,
        **{key: piece for key, piece in names.items() if piece},
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
