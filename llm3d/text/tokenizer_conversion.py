"""A sentencepiece model as a tokenizer of the tokenizers library, token for token.

Pieces are spelled with spaces in the places of U+2581, so that U+2581 itself, in a text, is no space: it goes through
the bytes of its UTF-8, as every character does that has no piece. Special tokens are found in the normalized text,
so that what stands before and after one is normalized as parts of the same text, as sentencepiece does. Three things
differ: a user-defined piece is found before all others; a text that starts with one, as a chat may with the mark of a
role, has no space before it; of several divisions that a unigram model scores the same the first is taken, where
sentencepiece's rounding decides.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tokenizers

META_SPACE = "\u2581"  # how sentencepiece writes a space inside its pieces
SWAPPED = str.maketrans(f" {META_SPACE}", f"{META_SPACE} ")
UNIGRAM, BPE = 1, 2  # sentencepiece's TrainerSpec.ModelType


def convert(content: bytes) -> tuple[tokenizers.Tokenizer, dict[str, str | None]]:
    """The tokenizer in the bytes of a tokenizer.model, and how its bos, eos and unknown tokens are spelled.

    BPE merges follow from the scores of pieces. Raises ValueError for what is no BPE or unigram model.
    """
    import tokenizers
    from sentencepiece import sentencepiece_model_pb2

    protocol: Any = sentencepiece_model_pb2  # made when it is imported, so that no type checker sees inside
    model = protocol.ModelProto.FromString(content)
    if model.trainer_spec.model_type not in (UNIGRAM, BPE):
        raise ValueError("neither a BPE nor a unigram model")
    kinds = protocol.ModelProto.SentencePiece
    of_text = (kinds.NORMAL, kinds.USER_DEFINED, kinds.UNUSED)
    learned = [piece.type in of_text for piece in model.pieces]
    spelled = [
        piece.piece.translate(SWAPPED) if text else piece.piece
        for piece, text in zip(model.pieces, learned, strict=True)
    ]
    result = tokenizers.Tokenizer(_model(model, spelled, learned))
    halves = _halves(spelled, learned) if model.trainer_spec.model_type == UNIGRAM else []
    _put_around(result, model.normalizer_spec, halves)
    result.add_tokens(
        [
            tokenizers.AddedToken(text, special=piece.type != kinds.USER_DEFINED, normalized=True)
            for text, piece in zip(spelled, model.pieces, strict=True)
            if piece.type in (kinds.CONTROL, kinds.UNKNOWN, kinds.USER_DEFINED)
            and not (
                model.normalizer_spec.remove_extra_whitespaces and text.isspace()
            )  # never there to be found
        ]
    )
    spec = model.trainer_spec
    ids = {"bos_token": spec.bos_id, "eos_token": spec.eos_id, "unk_token": spec.unk_id}
    return result, {name: spelled[i] if 0 <= i < len(spelled) else None for name, i in ids.items()}


def _model(model: Any, spelled: list[str], learned: list[bool]) -> Any:
    from tokenizers import models

    spec = model.trainer_spec
    if spec.model_type == UNIGRAM:
        # What no piece is found for scores 10 below the lowest of all; sentencepiece counts normal pieces alone.
        lowest = min(piece.score for piece in model.pieces if piece.type == piece.NORMAL)
        scores = [max(lowest, piece.score) for piece in model.pieces]
        return models.Unigram(
            list(zip(spelled, scores, strict=True)), unk_id=spec.unk_id, byte_fallback=spec.byte_fallback
        )
    return models.BPE(
        {text: i for i, text in enumerate(spelled)},
        _merges({s: p.score for s, p, text in zip(spelled, model.pieces, learned, strict=True) if text}),
        unk_token=spelled[spec.unk_id],
        fuse_unk=True,
        byte_fallback=spec.byte_fallback,
    )


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """All pairs of pieces that make up a piece, in the order in which sentencepiece merges them."""
    pairs = [
        (-score, i, text[:i], text[i:])
        for text, score in scores.items()
        for i in range(1, len(text))
        if text[:i] in scores and text[i:] in scores
    ]
    return [(left, right) for *_, left, right in sorted(pairs, key=lambda pair: pair[:2])]


def _halves(spelled: list[str], learned: list[bool]) -> list[tuple[str, str]]:
    """Of each piece that is no text two parts, one of which ends or begins with a piece, if any does."""
    pieces = {text for text, of_text in zip(spelled, learned, strict=True) if of_text}
    others = [text for text, of_text in zip(spelled, learned, strict=True) if not of_text]
    cuts = [next((i for i in range(1, len(s)) if {s[i - 1], s[i]} & pieces), 1) for s in others]
    return [(text[:i], text[i:]) for text, i in zip(others, cuts, strict=True)]


def _put_around(result: tokenizers.Tokenizer, spec: Any, halves: list[tuple[str, str]]) -> None:
    """What comes before the model and after it.

    spec: sentencepiece's NormalizerSpec.  halves: the model gets text cut where these meet.
    """
    from tokenizers import Regex, decoders, normalizers, pre_tokenizers

    steps: list[Any] = []
    before: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(" +"), " "), normalizers.Replace(Regex(r" \z"), "")]
        steps += [] if spec.add_dummy_prefix else [normalizers.Replace(Regex(r"\A "), "")]
    if spec.add_dummy_prefix:
        # A space before every text, also before one that starts with a space, but before no token that is found in it.
        doubled = normalizers.Replace(Regex(r"\A "), "  ")
        steps += [] if spec.remove_extra_whitespaces else [doubled]
        before.append(pre_tokenizers.Metaspace(replacement=" ", prepend_scheme="first", split=False))
    if halves:
        pattern = "|".join(f"{re.escape(first)}(?={re.escape(rest)})" for first, rest in halves)
        before.append(pre_tokenizers.Split(Regex(pattern), "merged_with_previous"))
    if before:
        result.pre_tokenizer = pre_tokenizers.Sequence(before)
    if steps:
        result.normalizer = normalizers.Sequence(steps)
    stripped = [decoders.Strip(" ", 1, 0)] if spec.add_dummy_prefix else []
    result.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), *stripped])
