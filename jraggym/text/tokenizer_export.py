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

from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from jraggym.errors import InputError
from jraggym.text.tokenizer import SentencePieceTokenizer

SPACE = "▁"  # SentencePiece's sign for a space


def huggingface_files(tokenizer: SentencePieceTokenizer, folder: str | Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json into `folder`, which is made where it is missing.

    Raises InputError for a model that is no byte-pair encoding of the unchanged text, as `train` makes it.
    """
    model = ModelProto.FromString(tokenizer.model)
    _refuse_other_models(model)
    Kind = model.SentencePiece
    pad, unknown = model.pieces[tokenizer.pad_id].piece, model.pieces[model.trainer_spec.unk_id].piece
    vocab = {piece.piece: i for i, piece in enumerate(model.pieces)}
    built = Tokenizer(models.BPE(vocab, _merges(model), byte_fallback=True))
    built.normalizer = normalizers.Replace(" ", SPACE)
    shown = [(unknown, model.trainer_spec.unk_surface), (SPACE, " ")]
    built.decoder = decoders.Sequence(
        [*(decoders.Replace(*pair) for pair in shown), decoders.ByteFallback(), decoders.Fuse()]
    )
    markers = [piece.piece for piece in model.pieces if piece.type == Kind.USER_DEFINED]
    built.add_tokens([AddedToken(marker, normalized=False, special=False) for marker in markers])
    PreTrainedTokenizerFast(
        tokenizer_object=built,
        pad_token=pad,
        padding_side="left",  # of prompts
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,  # a document that holds "<pad>" is no padding
    ).save_pretrained(folder)


def _refuse_other_models(model: ModelProto) -> None:
    spec, Kind = model.normalizer_spec, model.SentencePiece
    normal = [piece for piece in model.pieces if piece.type == Kind.NORMAL]
    merged = [piece.score for piece in normal if len(piece.piece) > 1]
    known = {piece.piece for piece in normal}
    odd = {
        "is no byte-pair encoding": model.trainer_spec.model_type != model.trainer_spec.BPE,
        "normalises its text": bool(spec.precompiled_charsmap) or spec.name != "identity",
        "adds or removes spaces": spec.add_dummy_prefix or spec.remove_extra_whitespaces or not spec.escape_whitespaces,
        "has no byte fallback": sum(piece.type == Kind.BYTE for piece in model.pieces) != 256,
        "has unused pieces": any(piece.type == Kind.UNUSED for piece in model.pieces),
        "has no padding": model.trainer_spec.pad_id < 0,
        "has pieces of equal score": len(set(merged)) != len(merged),
        "has a piece of unknown characters": not known.issuperset("".join(known)),
    }
    if found := [fault for fault, holds in odd.items() if holds]:
        remedy = "Give one that SentencePieceTokenizer.train made."
        raise InputError("this tokenizer cannot be exported", got=f"a model that {' and '.join(found)}", remedy=remedy)


def _merges(model: ModelProto) -> list[tuple[str, str]]:
    """All pairs of pieces that join to a piece, best score first.

    SentencePiece goes by the score of the result alone, so a pair counts even where no text was split so in training.
    """
    pieces = [piece for piece in model.pieces if piece.type == model.SentencePiece.NORMAL]
    known = {piece.piece for piece in pieces}
    ranked = [piece.piece for piece in sorted(pieces, key=lambda piece: -piece.score)]
    pairs = [(piece[:i], piece[i:]) for piece in ranked for i in range(1, len(piece))]
    return [(left, right) for left, right in pairs if left in known and right in known]
