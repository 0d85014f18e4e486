"""Tokenizers: load one, train one, save it so that transformers' AutoTokenizer loads the directory.

All go through the tokenizers library: `tokenizer.json` (LLaMA 3 and most others) as it stands, sentencepiece's
`tokenizer.model` (LLaMA 1 and 2) converted, and both with what the files beside them say, so that what is saved
gives in transformers the ids that it gives here. Text is only ever text: a special token that is spelled out in it is
encoded as the characters that it is made of, as with `split_special_tokens=True` in transformers, so that no
document can forge the end of a document.
"""

from __future__ import annotations

import copy
import hashlib
import re
import shutil
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llm3d.errors import InputError
from llm3d.files import write_json
from llm3d.text.tokenizer_files import CONFIG, COPIED, SideFiles

if TYPE_CHECKING:
    import tokenizers

__all__ = ["Tokenizer", "load_tokenizer", "split_text"]

JSON, SENTENCEPIECE = "tokenizer.json", "tokenizer.model"
META_SPACE = "\u2581"  # how sentencepiece writes a space inside its pieces
LONG_TEXT = 1 << 22  # characters above which any text is encoded in parts, to bound memory
SENTENCEPIECE_TEXT = 1 << 14  # the same where parts are faster and provably the same
HARD_TEXTS = (  # on which tokenizers that are nearly the same differ
    "",
    "abcd",
    " a",
    "  a   b ",
    " ",
    "    ",
    "\n",
    "\n\n\n x\r\n\ty",
    "x\n    if y:\n        return  z\n",
    "Don't they'll; 12345.678 <x> [y]",
    "\N{GRINNING FACE}\u4f60\u597d \u00e9e\u0301\ufb01\u00a0\u3000\u200d\ufe0f",
    "\0\x01\x7f\ufeff\ufffd\u2028",
    "<s></s><unk><0x41><|im_start|><|end_of_text|>",
)


class Tokenizer:
    """Text to token ids and back.

    vocab_size: highest id + 1.  bos_id, eos_id: int or None.  adds_bos: whether bos_id goes before a text that stands
    alone, here and, of what is saved, in transformers.  digest: hex SHA-256 of the tokenizer's file.
    """

    def __init__(self, file: Path, directory: Path | None):
        """directory: where side files lie; None: the file stands alone. Raises InputError."""
        content = file.read_bytes()
        self.file, self.directory, self.digest = file, directory, hashlib.sha256(content).hexdigest()
        self._model, named = _read(file, content)
        self._is_converted = bool(named)
        self._side = SideFiles.read(directory).with_names(named)
        self._num_pieces = self._model.get_vocab_size()
        self._side.add_to(self._model, normalized=True if self._is_converted else None)
        self._model.no_truncation()
        self._model.no_padding()
        self._model.encode_special_tokens = True
        vocab = self._model.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values(), default=-1) + 1
        self.bos_id = self._side.token_id("bos_token", self._model)
        self.eos_id = self._side.token_id("eos_token", self._model)
        add_bos = (
            self._side.config.get("add_bos_token", True) if self._is_converted else self._puts_bos_before()
        )
        self.adds_bos = bool(add_bos) and self.bos_id is not None
        self.newline = self._encode_whole(["\n"])[0]
        self._limit = SENTENCEPIECE_TEXT if self._newlines_stand_alone(vocab) else LONG_TEXT

    def _puts_bos_before(self) -> bool:
        return self._model.encode("a", add_special_tokens=True).ids[:1] == [self.bos_id]

    def _newlines_stand_alone(self, vocab: Iterable[str]) -> bool:
        """Whether a newline is a byte, and no token goes on with a space after a character that is none.

        What is cut at such places (see `split_text`) has the tokens that it has in one piece.
        """
        newline = self._model.token_to_id("<0x0A>")
        if newline is None or newline not in self.newline:
            return False
        return not any(
            "\n" in token or re.search(rf"[^ {META_SPACE}][ {META_SPACE}]", token) for token in vocab
        )

    def with_bos(self, added: bool) -> Tokenizer:
        """The same tokenizer with or without bos before a text; what has no bos adds none."""
        changed = copy.copy(self)
        changed.adds_bos = added and self.bos_id is not None
        return changed

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; no special tokens are added."""
        return self.encode_arrays([text])[0].tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, as `encode` gives them."""
        return [ids.tolist() for ids in self.encode_arrays(texts)]

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text, an int32 array [tokens] each. The fast way for many texts."""
        ids = self._encode_whole([text if len(text) <= self._limit else "" for text in texts])
        for i, text in enumerate(texts):
            if len(text) > self._limit:
                ids[i] = self._encode_in_parts(text)
        return ids

    def encode_documents(
        self, texts: Sequence[str], eos_id: int, bos_id: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Texts end to end, each with a bos before it, if one is given, and an eos after it.

        -> ids, int32 [sum of lengths]; lengths, int64 [texts].
        """
        before = np.array([] if bos_id is None else [bos_id], dtype=np.int32)
        after = np.array([eos_id], dtype=np.int32)
        ids = self.encode_arrays(texts)
        lengths = np.array([len(before) + len(array) + 1 for array in ids], dtype=np.int64)
        return np.concatenate([piece for array in ids for piece in (before, array, after)]), lengths

    def encode_next(self, text: str) -> np.ndarray:
        """Token ids of a text that continues another one, int32 [tokens].

        Differs from `encode` for tokenizers that put a space before every text. Exact where the text before
        ended in a newline that is a token of its own.
        """
        return np.concatenate([self._encode_next_part(part) for part in split_text(text, self._limit)])

    def encode_next_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text, as `encode_next` gives them. The fast way for many texts."""
        return [
            ids[len(self.newline) :] if self._starts_with_newline(ids) else self.encode_next(text)
            for text, ids in zip(texts, self.encode_arrays(["\n" + text for text in texts]), strict=True)
        ]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids, special tokens spelled out."""
        return self._model.decode([int(i) for i in ids], skip_special_tokens=False)

    def decode_next(self, ids: Iterable[int]) -> str:
        """Text of token ids that continue another text: no tokenizer leaves out the space that it starts with."""
        newline = self.newline.tolist()
        return self.decode([*newline, *ids])[len(self.decode(newline)) :]

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """Ids of the tokens that stand for themselves, not for text that was learned, by how they are spelled.

        Added tokens, the pieces that sentencepiece calls control or user-defined, and bos and eos.
        """
        added = {token.content: i for i, token in self._added.items()}
        ends = {self.token(i): i for i in (self.bos_id, self.eos_id) if i is not None}
        return {text: i for text, i in ends.items() if text is not None} | added

    @cached_property
    def control_ids(self) -> frozenset[int]:
        """Of the special tokens those that are no text to a reader: ends, roles, padding."""
        ends = (i for i in (self.bos_id, self.eos_id) if i is not None)
        return frozenset(i for i, token in self._added.items() if token.special).union(ends)

    @cached_property
    def _added(self) -> dict[int, tokenizers.AddedToken]:
        return self._model.get_added_tokens_decoder()

    @property
    def remarks(self) -> tuple[str, ...]:
        """What a user should know about it, for people."""
        if not (self._is_converted and type(self._model.model).__name__ == "Unigram"):
            return ()
        return (
            f"{self.file}: where two ways to divide a text score the same, it may be divided in another one than by "
            "sentencepiece itself; transformers divides it as is done here",
        )

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The tokens at which generation ends: eos, where there is one."""
        return () if self.eos_id is None else (self.eos_id,)

    def special_id(self, text: str) -> int | None:
        """The id of the special token that is spelled so."""
        return self.special_tokens.get(text)

    def find_special(self, text: str) -> list[tuple[int, int, int]]:
        """Where special tokens are spelled out in a text: first character, the one after the last, id."""
        special = self.special_tokens
        return [
            (match.start(), match.end(), special[match[0] if match[0] in special else match[0].strip()])
            for match in self._special_pattern.finditer(text)
        ]

    @cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        longest_first = sorted(filter(None, self.special_tokens), key=len, reverse=True)
        return re.compile("|".join(map(self._spelling, longest_first)) or "(?!)")

    def _spelling(self, special: str) -> str:
        """A pattern for a special token in a text, with the spaces that it takes up."""
        added = self._added.get(self.special_tokens[special])
        if added is None:
            return re.escape(special)
        return r"\s*" * added.lstrip + re.escape(special) + r"\s*" * added.rstrip

    def token(self, index: int) -> str | None:
        """How a token is spelled; None for an id that no token has."""
        return self._model.id_to_token(index)

    @cached_property
    def starts_anew_after_special(self) -> bool:
        """Whether text after a special token is encoded as if nothing stood before it.

        Found by trial, since normalizers differ: some put a space before every stretch of text.
        """
        special = next((token for token in self._added.values() if token.special), None)
        if special is None:
            return False
        self._model.encode_special_tokens = False
        ids = self._model.encode(f"{special.content}a", add_special_tokens=False).ids
        self._model.encode_special_tokens = True
        return ids[1:] == self.encode("a")

    def save_to(self, directory: str | Path) -> None:
        """Write the tokenizer into a directory (made if missing) that transformers' AutoTokenizer loads.

        tokenizer.json is to be used as it stands; a sentencepiece model stays beside it, for programs that read it.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        names = {"bos_token": self.bos_id, "eos_token": self.eos_id}
        spelled = {name: None if i is None else self.token(i) for name, i in names.items()}
        config = self._side.config_of(spelled, self.adds_bos, self._is_converted)
        if self.directory is not None:
            for name in (*COPIED, SENTENCEPIECE):
                _copy(self.directory / name, directory / name)
        if self._is_converted:
            _copy(self.file, directory / SENTENCEPIECE)
            self._write_tokens_beside_pieces(directory / "added_tokens.json")
        self._write_json(directory / JSON)
        (directory / "special_tokens_map.json").unlink(
            missing_ok=True
        )  # of an older tokenizer; the names are in:
        write_json(directory / CONFIG, config)

    def _write_json(self, file: Path) -> None:
        bos = [self.bos_id] if self.adds_bos else []
        alone = [*bos, *self.encode("a")]
        if not self._is_converted and self._model.encode("a", add_special_tokens=True).ids == alone:
            _copy(self.file, file)
            return
        from tokenizers import Tokenizer, processors

        model = Tokenizer.from_str(self._model.to_str())
        before = [(str(self.token(i)), i) for i in bos if i is not None]
        single, pair = (" ".join([*(t for t, _ in before), text]) for text in ("$A:0", "$B:1"))
        model.post_processor = processors.TemplateProcessing(single, f"{single} {pair}", before)
        model.save(str(file))

    def _write_tokens_beside_pieces(self, file: Path) -> None:
        added = {token.content: i for i, token in self._added.items() if i >= self._num_pieces}
        if added:
            write_json(file, added)

    def difference_from(self, other: Tokenizer) -> str | None:
        """One line on token ids of this tokenizer that mean something else in another; None where all mean the same.

        Higher ids, which only the other has, do not matter. Which tokens are bos and eos is no such difference: that
        is for the use of a tokenizer, not for its ids.
        """
        apart = self.special_tokens.items() ^ other.special_tokens.items()
        for index, text in sorted((index, text) for text, index in apart):
            if index < self.vocab_size:
                return f"the special token {text!r} has the id {index} in one of the two alone"
        if self.digest == other.digest:
            return None
        for index in range(self.vocab_size):
            mine, others = self._token_or_none(index), other._token_or_none(index)
            if mine != others:
                return f"the token {index} is {mine!r} in one and {others!r} in the other"
        texts = [*HARD_TEXTS, *self._sampled_texts()]
        for text, ids, other_ids in zip(
            texts, self.encode_batch(texts), other.encode_batch(texts), strict=True
        ):
            if ids != other_ids:
                return f"the text {text!r} is {ids} in one and {other_ids} in the other"
        return None

    def _token_or_none(self, index: int) -> str | None:
        token = self.token(index)
        return None if token is None else token.replace(META_SPACE, " ")

    def _sampled_texts(self) -> list[str]:
        """Texts of tokens all over the vocabulary: how they are put together is found by encoding them."""
        return [self.decode([index]) for index in range(0, self.vocab_size, 1 + self.vocab_size // 4096)]

    def _encode_whole(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self._model.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def _encode_in_parts(self, text: str) -> np.ndarray:
        first, *rest = split_text(text, self._limit)
        return np.concatenate([self._encode_whole([first])[0], *map(self._encode_next_part, rest)])

    def _encode_next_part(self, text: str) -> np.ndarray:
        ids = self._encode_whole(["\n" + text])[0]
        if self._starts_with_newline(ids):
            return ids[len(self.newline) :]
        return self._encode_whole([text])[0]

    def _starts_with_newline(self, ids: np.ndarray) -> bool:
        return np.array_equal(ids[: len(self.newline)], self.newline)


def split_text(text: str, limit: int) -> list[str]:
    """Cut a text into parts of about `limit` characters.

    After a newline before a character that is no space, or before a lone space, where the usual splitting rules
    cut as well; anywhere only where LONG_TEXT characters have no such place.
    """
    parts, start = [], 0
    while len(text) - start > limit:
        stop = _cut(text, start + (limit + 1) // 2, start + limit)
        stop = stop or _cut(text, start + limit, start + LONG_TEXT) or start + LONG_TEXT
        parts.append(text[start:stop])
        start = stop
    return [*parts, text[start:]]


def _cut(text: str, low: int, high: int) -> int | None:
    at = high = min(high, len(text) - 1)
    while (at := text.rfind("\n", low, at)) >= 0:
        if not text[at + 1].isspace():
            return at + 1
    at = high
    while (at := text.rfind(" ", low, at)) >= 0:
        if not text[at - 1].isspace() and not text[at + 1].isspace():
            return at
    return None


def _copy(source: Path, target: Path) -> None:
    if source.is_file() and source.resolve() != target.resolve():
        shutil.copyfile(source, target)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """A tokenizer from a sentencepiece `.model` file, a `tokenizer.json`, or a directory that holds either.

    A directory that holds both gives the `tokenizer.json`, as in transformers. Raises InputError.
    """
    path = Path(path)
    if path.is_dir():
        for name in (JSON, SENTENCEPIECE):
            if (path / name).is_file():
                return Tokenizer(path / name, path)
        raise InputError(f"{path}: holds neither {JSON} nor {SENTENCEPIECE}; name a tokenizer")
    if not path.is_file():
        raise InputError(f"{path}: no such tokenizer; name a .model file, a tokenizer.json or a directory")
    return Tokenizer(path, path.parent if path.name in (JSON, SENTENCEPIECE) else None)


def _read(file: Path, content: bytes) -> tuple[tokenizers.Tokenizer, dict[str, str | None]]:
    """The library's tokenizer, and the tokens that a sentencepiece model names."""
    import tokenizers

    if file.suffix == ".json":
        try:
            return tokenizers.Tokenizer.from_buffer(content), {}
        except Exception as error:  # the library raises nothing narrower
            raise InputError(f"{file}: not a tokenizer.json of the tokenizers library ({error})") from error
    from llm3d.text.tokenizer_conversion import convert

    try:
        return convert(content)
    except Exception as error:  # protobuf's and the library's own
        raise InputError(f"{file}: not a sentencepiece model ({error}); give the right file") from error
