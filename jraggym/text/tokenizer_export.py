"""Our tokenizer as the files of a Hugging Face one, for those who serve the model with other tools.

`AutoTokenizer.from_pretrained(folder)` then gives exactly our ids, and our texts with `skip_special_tokens=True`.
A whole prompt may be given as one string: each of its segments begins with a marker, and markers are cut out of a
text before anything is merged, so the ids of the joined text are the joined ids of the segments. An action begins
with a marker as well; only a malformed one may not, and is encoded on its own to get our ids.

Two differences are left. Where sampled byte tokens make no valid UTF-8, SentencePiece keeps the valid characters of
the run, and `tokenizers` writes U+FFFD for each byte of it. And beside a config.json of the type qwen2, AutoTokenizer
of transformers 5 takes a tokenizer of its own, whatever the files say: export the model as another type (llama).
"""

from __future__ import annotations

from pathlib import Path

from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from jraggym.errors import InputError
from jraggym.text.rendering import MARKERS
from jraggym.text.tokenizer import SentencePieceTokenizer

SPACE = "▁"  # SentencePiece's sign for a space
# what other models treat in other ways
PROBES = ("  two  spaces ", "ﬁ① e\u0301 日本 😀\n", f"a{''.join(MARKERS)}b", "")


def huggingface_files(tokenizer: SentencePieceTokenizer, folder: str | Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json into `folder`, which is made where it is missing.

    Raises InputError for a model that gives other ids so: one that is no byte-pair encoding of the unchanged text with
    our markers and a padding token, as `train` makes it.
    """
    model = SentencePieceProcessor(model_proto=tokenizer.model)
    built = _build(model)
    pieces = [piece.replace(SPACE, " ") for piece in built.get_vocab()]
    texts = (*PROBES, *pieces, "".join(pieces))
    faults = (
        f"{theirs} for {ours} of {text!r}"
        for text in texts
        if (theirs := built.encode(text).ids) != (ours := model.encode(text))
    )
    fault = "no padding token" if tokenizer.pad_id < 0 else next(faults, None)
    if fault is not None:
        remedy = "Give one that SentencePieceTokenizer.train made."
        raise InputError("this tokenizer cannot be exported", got=fault, remedy=remedy)
    PreTrainedTokenizerFast(
        tokenizer_object=built,
        pad_token=built.id_to_token(tokenizer.pad_id),
        padding_side="left",  # of prompts
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,  # a document that holds "<pad>" is no padding
    ).save_pretrained(folder)


def _build(model: SentencePieceProcessor) -> Tokenizer:
    """The same pieces with the same ids, merged, shown and spelled in bytes as SentencePiece does."""
    ids, unknown = range(model.get_piece_size()), model.unk_id()
    vocab = {model.id_to_piece(i): i for i in ids}
    own = {piece: i for piece, i in vocab.items() if piece not in MARKERS}
    scores = {
        piece: model.get_score(i)
        for piece, i in own.items()
        if not (model.is_byte(i) or model.is_control(i) or i == unknown)
    }
    built = Tokenizer(models.BPE(vocab, _merges(scores), byte_fallback=True))
    built.normalizer = normalizers.Replace(" ", SPACE)
    shown = [(model.id_to_piece(unknown), model.decode([unknown])), (SPACE, " ")]
    replaced = (decoders.Replace(*pair) for pair in shown)
    built.decoder = decoders.Sequence([*replaced, decoders.ByteFallback(), decoders.Fuse()])
    built.add_tokens([AddedToken(marker, normalized=False, special=False) for marker in MARKERS if marker in vocab])
    return built


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """All pairs of pieces that join to a piece, best score first.

    SentencePiece goes by the score of the result alone, so a pair counts even where no text was split so in training.
    """
    ranked = sorted(scores, key=lambda piece: -scores[piece])
    pairs = [(piece[:i], piece[i:]) for piece in ranked for i in range(1, len(piece))]
    return [(left, right) for left, right in pairs if left in scores and right in scores]
