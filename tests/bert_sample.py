"""Folders of small random BERT models, as transformers writes them, and texts to embed."""

import json

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel

SENTENCES = [
    "The Tarvan rises in the hills of Morn.",
    "Who wrote three novels and was born in Port Selby?",
    "A.",
    "Port Selby lies on the sea and has a harbour, a museum, a fish market and, since 1904, a tram. " * 3,
    "Zażółć gęślą jaźń; 東京 is not Kyōto.",
    "",
]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
WORDS = [*SPECIAL, "the", "a", "of", "and", "in", "sea", "port", "who", "was", "born"]
WORDS += ["hill", "##s", "mor", "##n", "tar", "##van", "novel", ".", ":", "query", "passage", "repre", "##sent"]


def write_tokenizer(path, special=False):
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    if special:
        tokenizer.add_special_tokens(SPECIAL)
    tokenizer.enable_truncation(5)  # as published files do: the sentence settings overrule it
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(path))


def write_bert(folder, seed=0, positions=24, width=32, **changes):
    """A plain folder of transformers: config.json, model.safetensors, tokenizer.json."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=40,
        hidden_size=width,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=positions,
        initializer_range=0.3,
        **changes,
    )
    BertModel(config).save_pretrained(folder)
    write_tokenizer(folder / "tokenizer.json", special=True)
    return folder


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
