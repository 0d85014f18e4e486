"""Training tokenizers: sentencepiece BPE as in LLaMA 1 and 2, byte-level BPE as in LLaMA 3.

Both give back any Unicode text exactly. The same text gives the same files, whatever the machine.
"""

import io
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from llm3d.corpus.documents import BadRecord, Format, divide, find_files, read_item
from llm3d.errors import InputError
from llm3d.files import check_output, new_directory
from llm3d.permutation import derive_key
from llm3d.text.tokenizer import load_tokenizer
from llm3d.wording import first_line

KINDS = ("sentencepiece", "byte-level")
PART = 1000  # characters in a part of a document: a sentence for sentencepiece, a unit of sampling for both
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BEGIN, END = "<|begin_of_text|>", "<|end_of_text|>"


def train_tokenizer(
    files: Sequence[str | Path],
    output: str | Path,
    kind: str,
    vocab_size: int,
    *,
    text_field: str = "text",
    separator: str | None = None,
    max_bytes: int = 1_000_000_000,
    character_coverage: float = 0.9995,
    skip_bad: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Train a tokenizer and write the directory `output`, which AutoTokenizer loads. All or nothing.

    files: paths, directories or patterns (kinds as in llm3d.corpus.documents).  kind: "sentencepiece" or
    "byte-level".  vocab_size: all tokens, special ones included.  max_bytes: where the files hold more, a
    fixed pseudo-random part of about that size is trained on.  character_coverage: sentencepiece gives this
    share of all characters tokens of their own; the others are spelled in bytes.
    Returns {kind, vocab_size, documents, bytes, skipped, output}. Raises InputError.
    """
    if kind not in KINDS:
        raise InputError(f"tokenizer kind {kind!r}; choose one of {', '.join(KINDS)}")
    check_output(Path(output).absolute(), overwrite, "tokenizer_config.json")
    paths = find_files(files)
    share = min(1.0, max_bytes / max(1, sum(path.stat().st_size for path in paths)))
    text = _Text(paths, Format(text_field, separator), share, skip_bad)
    with new_directory(output, overwrite, "tokenizer_config.json") as directory:
        if kind == "sentencepiece":
            _train_sentencepiece(text, directory, vocab_size, character_coverage)
        else:
            _train_byte_level(text, directory, vocab_size)
        trained = load_tokenizer(directory)
        trained.save_to(directory)
    return {
        "kind": kind,
        "vocab_size": trained.vocab_size,
        "documents": text.documents,
        "bytes": text.bytes,
        "skipped": text.skipped,
        "output": str(output),
    }


class _Text:
    """The text to train on, in parts, counted as it is read.

    error: that ended the reading; a library in whose loop it was raised may report it as its own.
    """

    def __init__(self, paths: Sequence[Path], form: Format, share: float, skip_bad: bool):
        self.paths, self.form, self.share, self.skip_bad = paths, form, share, skip_bad
        self.documents = self.parts = self.bytes = self.skipped = 0
        self.error: InputError | None = None

    def __iter__(self) -> Iterator[str]:
        try:
            yield from self._parts()
        except InputError as error:
            self.error = error
            raise

    def _parts(self) -> Iterator[str]:
        for document in self._documents():
            for start in range(0, len(document), PART):
                part = document[start : start + PART]
                self.parts += 1
                if self.share < 1 and derive_key(self.parts) >= self.share * 2**64:
                    continue
                self.bytes += len(part.encode())
                yield part

    def _documents(self) -> Iterator[str]:
        for path in self.paths:
            for item in divide(path, self.form):
                for document in read_item(item, self.form):
                    if isinstance(document, BadRecord):
                        self._skip(document)
                    elif document and not document.isspace():
                        self.documents += 1
                        yield document

    def _skip(self, bad: BadRecord) -> None:
        if not self.skip_bad:
            raise InputError(f"{bad}; correct it, or skip bad records")
        self.skipped += 1


def _train_sentencepiece(text: _Text, directory: Path, vocab_size: int, coverage: float) -> None:
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(text),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=coverage,
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            max_sentence_length=8 * PART,
            minloglevel=3,
        )
    except (RuntimeError, ValueError, OSError) as error:
        if text.error is not None:
            raise text.error from None
        raise _sentencepiece_error(error, text, vocab_size) from error
    _check_text(text)
    (directory / "tokenizer.model").write_bytes(model.getvalue())


def _sentences(text: Iterable[str]) -> Iterator[str]:
    """Lines without the characters that sentencepiece keeps to itself (it would drop the whole sentence)."""
    for part in text:
        for sentence in re.split("[\n\r\t\0\u2581\u2585]", part):
            if sentence:
                yield sentence


def _sentencepiece_error(error: Exception, text: _Text, vocab_size: int) -> InputError:
    _check_text(text)
    message = str(error)
    high = re.search(r"value <= (\d+)", message)
    if high:
        return _too_large(vocab_size, int(high[1]))
    low = re.search(r"required_chars\D*\d+ vs (\d+)", message)
    needed = f"at least {int(low[1])}" if low else "more"
    if low or "smaller than required" in message or "vocab_size" in message:
        return InputError(
            f"vocab_size {vocab_size} is too small: the characters of this text and 256 bytes need {needed}; "
            "raise it, or lower character_coverage"
        )
    return InputError(f"sentencepiece cannot train on this text: {first_line(error)}")


def _train_byte_level(text: _Text, directory: Path, vocab_size: int) -> None:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    special = [BEGIN, END]
    smallest = 256 + len(special)
    if vocab_size < smallest:
        raise InputError(f"vocab_size {vocab_size} is too small: bytes and special tokens need {smallest}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(iter(text), trainer)
    _check_text(text)
    tokenizer.add_special_tokens(special)
    if tokenizer.get_vocab_size() < vocab_size:
        raise _too_large(vocab_size, tokenizer.get_vocab_size())
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A",
        pair=f"{BEGIN} $A {BEGIN} $B",
        special_tokens=[(BEGIN, tokenizer.token_to_id(BEGIN))],
    )
    tokenizer.save(str(directory / "tokenizer.json"))


def _check_text(text: _Text) -> None:
    if not text.documents:
        raise InputError(f"{text.paths[0]}: the corpus is empty (no document has text); name files with text")


def _too_large(vocab_size: int, possible: int) -> InputError:
    return InputError(
        f"vocab_size {vocab_size} is too large for this text, which gives at most {possible} tokens; "
        "lower it or add text"
    )
