"""Tokenizers: load one, train one, save it so that transformers' AutoTokenizer loads the directory.

Two libraries, one face: sentencepiece (`tokenizer.model`, LLaMA 1 and 2) and tokenizers (`tokenizer.json`,
LLaMA 3 and most others). Text is only ever text: a special token that is spelled out in it is encoded as the
characters that it is made of, as with `split_special_tokens=True` in transformers, so that no document can
forge the end of a document.
"""

import hashlib
import json
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from llm3d.errors import InputError

SIDE_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)
COMMON_BOS = ("<s>", "<|begin_of_text|>", "<bos>", "[BOS]")
COMMON_EOS = ("</s>", "<|end_of_text|>", "<|endoftext|>", "<eos>", "[EOS]")
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
    "\u2581a \u2581\u2581 b\u2581",
    "Don't they'll; 12345.678 <x> [y]",
    "\N{GRINNING FACE}\u4f60\u597d \u00e9e\u0301\ufb01\u00a0\u3000\u200d\ufe0f",
    "\0\x01\x7f\ufeff\ufffd\u2028",
    "<s></s><unk><0x41><|im_start|><|end_of_text|>",
)


class Tokenizer(ABC):
    """Text to token ids and back.

    vocab_size: highest id + 1.  bos_id, eos_id: int or None.  digest: hex SHA-256 of the tokenizer's file.
    """

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    _file_name: str
    _limit = LONG_TEXT  # characters of a text that goes through the library in one piece

    def __init__(self, file: Path, directory: Path | None):
        self.file = file
        self.directory = directory  # where side files lie; None: the file stands alone
        self.digest = hashlib.sha256(file.read_bytes()).hexdigest()
        self.newline = np.zeros(0, dtype=np.int32)
        self.newline = self._encode_whole(["\n"])[0]

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

    def encode_documents(self, texts: Sequence[str], eos_id: int) -> tuple[np.ndarray, np.ndarray]:
        """Texts end to end, an eos after each: ids int32 [sum of lengths], lengths int64 [texts]."""
        ids = self.encode_arrays(texts)
        eos = np.array([eos_id], dtype=np.int32)
        lengths = np.array([len(array) + 1 for array in ids], dtype=np.int64)
        return np.concatenate([piece for array in ids for piece in (array, eos)]), lengths

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

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str: ...

    def decode_next(self, ids: Iterable[int]) -> str:
        """Text of token ids that continue another text: no tokenizer leaves out the space that it starts with."""
        newline = self.newline.tolist()
        return self.decode([*newline, *ids])[len(self.decode(newline)) :]

    @property
    @abstractmethod
    def special_tokens(self) -> dict[str, int]:
        """Ids of the tokens that stand for themselves, not for text that was learned, by how they are spelled."""

    @property
    @abstractmethod
    def control_ids(self) -> frozenset[int]:
        """Of the special tokens those that are no text to a reader: ends, roles, padding."""

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
        return re.escape(special)

    @property
    @abstractmethod
    def adds_bos(self) -> bool:
        """Whether transformers puts bos_id before a text that stands alone."""

    def _asked_to_add_bos(self) -> bool | None:
        """What tokenizer_config.json says; None where it does not."""
        file = self.directory / "tokenizer_config.json" if self.directory else None
        asked = read_json(file).get("add_bos_token") if file is not None and file.is_file() else None
        return None if asked is None else bool(asked)

    @abstractmethod
    def token(self, index: int) -> str | None:
        """How a token is spelled; None for an id that no token has."""

    @property
    @abstractmethod
    def starts_anew_after_special(self) -> bool:
        """Whether text after a special token is encoded as if nothing stood before it."""

    def save_to(self, directory: str | Path) -> None:
        """Copy the tokenizer into a directory (made if missing) that transformers' AutoTokenizer loads."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        sources = {self._file_name: self.file}
        if self.directory is not None:
            sources |= {name: self.directory / name for name in SIDE_FILES}
        for name, source in sources.items():
            if source.is_file() and source.resolve() != (directory / name).resolve():
                shutil.copyfile(source, directory / name)
        if not (directory / "tokenizer_config.json").exists():
            write_json(directory / "tokenizer_config.json", self._config())

    def difference_from(self, other: "Tokenizer") -> str | None:
        """One line on token ids that mean something else in another tokenizer; None where all mean the same.

        Which tokens are bos and eos is no such difference: that is for the use of a tokenizer, not for its ids.
        """
        if self.special_tokens != other.special_tokens:
            mine, others = self.special_tokens.items(), other.special_tokens.items()
            text, index = min(mine ^ others, key=lambda item: (item[1], item[0]))
            return f"the special token {text!r} has the id {index} in one of the two alone"
        if self.digest == other.digest:
            return None
        for index in range(max(self.vocab_size, other.vocab_size)):
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
        return self.token(index) if index < self.vocab_size else None

    def _sampled_texts(self) -> list[str]:
        """Texts of tokens all over the vocabulary: how they are put together is found by encoding them."""
        return [self.decode([index]) for index in range(0, self.vocab_size, 1 + self.vocab_size // 4096)]

    @abstractmethod
    def _config(self) -> dict[str, Any]: ...

    @abstractmethod
    def _encode_whole(self, texts: Sequence[str]) -> list[np.ndarray]: ...

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


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model."""

    _file_name = "tokenizer.model"

    def __init__(self, file: Path, directory: Path | None):
        import sentencepiece

        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(file))
        except (RuntimeError, OSError) as error:
            raise InputError(f"{file}: not a sentencepiece model; give the right file") from error
        model = self._model
        self.vocab_size = model.vocab_size()
        self.bos_id = model.bos_id() if model.bos_id() >= 0 else None
        self.eos_id = model.eos_id() if model.eos_id() >= 0 else None
        self._meta_space = np.array(
            [model.piece_to_id(f"<0x{byte:02X}>") for byte in META_SPACE.encode()], dtype=np.int32
        )
        self._escapes = all(model.is_byte(int(i)) for i in self._meta_space)
        super().__init__(file, directory)
        pieces = "\r".join(model.id_to_piece(list(range(self.vocab_size))))
        words_alone = not re.search(
            f"[^\r{META_SPACE}]{META_SPACE}", pieces
        )  # no space inside or after a word
        newline_alone = self._escapes and "\n" not in pieces and model.piece_to_id("<0x0A>") in self.newline
        self._limit = SENTENCEPIECE_TEXT if newline_alone and words_alone else LONG_TEXT
        nul = self._encode_whole(["\0"])[0]
        alone = newline_alone and "\0" not in pieces and len(nul) == len(self.newline)
        self._nul = int(nul[-1]) if alone else None  # the token of NUL, where it never merges with others

    def encode_documents(self, texts: Sequence[str], eos_id: int) -> tuple[np.ndarray, np.ndarray]:
        """As for any tokenizer, but many short texts go through the library in one call."""
        nul = self._nul
        if nul is None or max(map(len, texts)) > self._limit or not all(texts):
            return super().encode_documents(texts, eos_id)
        count = 1 + len(texts) * self._limit // sum(map(len, texts))
        prefix = "\0 " if len(self._prefix()) else "\0"
        groups = [prefix.join(texts[i : i + count]) + "\0" for i in range(0, len(texts), count)]
        ids = np.concatenate(self._encode_whole(groups))
        ends = np.flatnonzero(ids == nul)
        if len(ends) != len(texts):  # a text holds NUL itself
            return super().encode_documents(texts, eos_id)
        ids[ends] = eos_id
        return ids, np.diff(ends, prepend=-1)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids; bos, eos and padding have none."""
        return self._model.decode([int(i) for i in ids])

    starts_anew_after_special = False

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """Control pieces such as <s> and </s>, the unknown piece, and those that were defined in training."""
        from sentencepiece import sentencepiece_model_pb2

        protocol: Any = (
            sentencepiece_model_pb2  # made when it is imported, so that no type checker sees inside
        )
        model = protocol.ModelProto.FromString(self._model.serialized_model_proto())
        kinds = protocol.ModelProto.SentencePiece
        special = (kinds.CONTROL, kinds.UNKNOWN, kinds.USER_DEFINED)
        return {piece.piece: i for i, piece in enumerate(model.pieces) if piece.type in special}

    @cached_property
    def control_ids(self) -> frozenset[int]:
        model = self._model
        return frozenset(i for i in range(self.vocab_size) if model.is_control(i) or model.is_unknown(i))

    @cached_property
    def adds_bos(self) -> bool:
        asked = self._asked_to_add_bos()
        return True if asked is None else asked

    def token(self, index: int) -> str:
        return self._model.id_to_piece(index)

    def _encode_whole(self, texts: Sequence[str]) -> list[np.ndarray]:
        ids = self._model.encode_as_numpy(list(texts), num_threads=1)
        if self._escapes:
            for i, text in enumerate(texts):
                if META_SPACE in text:
                    ids[i] = self._encode_meta_spaces(text)
        return ids

    def _encode_meta_spaces(self, text: str) -> np.ndarray:
        """U+2581 itself, which the library cannot tell from a space, goes through its UTF-8 bytes."""
        first, *rest = text.split(META_SPACE)
        # A text that starts with U+2581 still needs what the model puts before every text, if anything.
        parts = [self._encode_whole([first])[0] if first else self._prefix()]
        for part in rest:
            parts += [self._meta_space, self.encode_next(part)]
        return np.concatenate(parts)

    def _prefix(self) -> np.ndarray:
        """What the model puts before every text: nothing, or the token of a space. int32 [0 or 1]."""
        return self.newline[: len(self.newline) - 1]

    def _config(self) -> dict[str, Any]:
        piece = self._model.id_to_piece
        names = {"bos_token": self.bos_id, "eos_token": self.eos_id, "unk_token": self._model.unk_id()}
        return {
            "tokenizer_class": "LlamaTokenizer",
            "add_prefix_space": len(self._prefix()) > 0,
            "add_bos_token": True,
            "add_eos_token": False,
            "legacy": False,
            "clean_up_tokenization_spaces": False,
            **{name: piece(index) for name, index in names.items() if index is not None},
        }


class JsonTokenizer(Tokenizer):
    """A `tokenizer.json` of the tokenizers library."""

    _file_name = "tokenizer.json"

    def __init__(self, file: Path, directory: Path | None):
        import tokenizers

        try:
            self._model = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises nothing narrower
            raise InputError(f"{file}: not a tokenizer.json of the tokenizers library ({error})") from error
        self._model.no_truncation()
        self._model.no_padding()
        self._model.encode_special_tokens = True
        vocab = self._model.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values(), default=-1) + 1
        self.bos_id = _special_id("bos", vocab, directory, COMMON_BOS)
        self.eos_id = _special_id("eos", vocab, directory, COMMON_EOS)
        super().__init__(file, directory)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids, special tokens spelled out."""
        return self._model.decode([int(i) for i in ids], skip_special_tokens=False)

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """Added tokens, and what stands for the beginning and the end."""
        added = {token.content: i for i, token in self._model.get_added_tokens_decoder().items()}
        ends = {self.token(i): i for i in (self.bos_id, self.eos_id) if i is not None}
        return {text: i for text, i in ends.items() if text is not None} | added

    @cached_property
    def control_ids(self) -> frozenset[int]:
        added = self._model.get_added_tokens_decoder().items()
        ends = (i for i in (self.bos_id, self.eos_id) if i is not None)
        return frozenset(i for i, token in added if token.special).union(ends)

    @cached_property
    def adds_bos(self) -> bool:
        asked = self._asked_to_add_bos()
        return asked if asked is not None else self._bos_is_put_before()

    def _bos_is_put_before(self) -> bool:
        return self._model.encode("a", add_special_tokens=True).ids[:1] == [self.bos_id]

    def token(self, index: int) -> str | None:
        return self._model.id_to_token(index)

    def _spelling(self, special: str) -> str:
        added = self._model.get_added_tokens_decoder().get(self.special_tokens[special])
        if added is None:
            return re.escape(special)
        return r"\s*" * added.lstrip + re.escape(special) + r"\s*" * added.rstrip

    @cached_property
    def starts_anew_after_special(self) -> bool:
        """Found by trial, since normalizers differ: some put a space before every stretch of text."""
        special = next((t for t in self._model.get_added_tokens_decoder().values() if t.special), None)
        if special is None:
            return False
        self._model.encode_special_tokens = False
        ids = self._model.encode(f"{special.content}a", add_special_tokens=False).ids
        self._model.encode_special_tokens = True
        return ids[1:] == self.encode("a")

    def _encode_whole(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self._model.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def _config(self) -> dict[str, Any]:
        names = {"bos_token": self.bos_id, "eos_token": self.eos_id}
        tokens = {n: self._model.id_to_token(i) for n, i in names.items() if i is not None}
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **tokens,
        }


def load_tokenizer(path: str | Path) -> Tokenizer:
    """A tokenizer from a sentencepiece `.model` file, a `tokenizer.json`, or a directory that holds either.

    A directory that holds both gives the `tokenizer.json`, as in transformers. Raises InputError.
    """
    path = Path(path)
    if path.is_dir():
        for name, kind in (("tokenizer.json", JsonTokenizer), ("tokenizer.model", SentencePieceTokenizer)):
            if (path / name).is_file():
                return kind(path / name, path)
        raise InputError(f"{path}: holds neither tokenizer.json nor tokenizer.model; name a tokenizer")
    if not path.is_file():
        raise InputError(f"{path}: no such tokenizer; name a .model file, a tokenizer.json or a directory")
    directory = path.parent if path.name in ("tokenizer.json", "tokenizer.model") else None
    if path.suffix == ".json":
        return JsonTokenizer(path, directory)
    return SentencePieceTokenizer(path, directory)


def _special_id(
    name: str, vocab: dict[str, int], directory: Path | None, common: Sequence[str]
) -> int | None:
    """The id of bos or eos: what the files beside the tokenizer say, else a common name that it knows."""
    for file in ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "config.json"):
        config = read_json(directory / file) if directory else {}
        token = config.get(f"{name}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str) and token in vocab:
            return vocab[token]
        ids = config.get(f"{name}_token_id")
        index = ids[0] if isinstance(ids, list) and ids else ids
        if isinstance(index, int):
            return index
    return next((vocab[token] for token in common if token in vocab), None)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one where there is no file, or another value in it."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error}); repair or remove it") from error
    return content if isinstance(content, dict) else {}


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def train_tokenizer(
    files: Sequence[str | Path], output: str | Path, kind: str, vocab_size: int, **options: Any
) -> dict[str, Any]:
    """Train a tokenizer on text files: `llm3d.data.tokenizer_training.train_tokenizer`, options as there."""
    from llm3d.data.tokenizer_training import train_tokenizer as train

    return train(files, output, kind, vocab_size, **options)
