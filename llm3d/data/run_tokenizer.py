"""The tokenizer that a run's settings name, what has to agree with it, and its tokens that end a reply."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from llm3d.config import Config, DataSource, with_vocab_size
from llm3d.config.hugging_face import generation_settings, hugging_face_directory, token_ids
from llm3d.config.peft import adapter_directory
from llm3d.config.places import latest_checkpoint
from llm3d.data.pretraining import resolve_prefix
from llm3d.errors import InputError
from llm3d.text.templates import Template
from llm3d.text.tokenizer import Tokenizer, load_tokenizer

C = TypeVar("C", bound=Config)


def end_ids(config: Config, tokenizer: Tokenizer, template: Template | None) -> set[int]:
    """Tokens that end a reply: the model's, the tokenizer's, and the template's. A checkpoint says the same."""
    of_run = (*tokenizer.end_ids, *(template.end_ids if template else ()))
    of_base = generation_settings(config.model.path).get("eos_token_id")
    return set(token_ids(config.model.eos_token_id, of_base, of_run))


def open_tokenizer(config: C) -> tuple[C, Tokenizer | None]:
    """The run's tokenizer, if it has one; its size becomes model.vocab_size where that is not set.

    Raises InputError where the two disagree, or ids mean something else to what a model starts from or reads.
    """
    path = config.data.tokenizer
    if path is None and config.reads != "tokens" and config.model.path is not None:
        path = str(hugging_face_directory(config.model.path))
    tokenizer = None if path is None else load_tokenizer(path)
    check_token_ids(tokenizer, _handed_on(config))
    if tokenizer is None:
        if config.model.vocab_size is None:
            raise InputError("model.vocab_size: not set; set it, or data.tokenizer, which tells it")
        return config, None
    if config.model.vocab_size is None:
        return with_vocab_size(config, tokenizer.vocab_size), tokenizer
    if tokenizer.vocab_size > config.model.vocab_size:
        raise InputError(
            f"data.tokenizer: {path} has {tokenizer.vocab_size} tokens, more than "
            f"model.vocab_size {config.model.vocab_size}; give the model's own tokenizer, or a larger vocab_size"
        )
    return config, tokenizer


def with_saved_bos(config: Config, tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer as it lies beside the run's latest weights: with or without bos before a text.

    Without such weights it is what the settings name.
    """
    resume, run_dir = config.checkpoint.resume, Path(config.run.dir)
    checkpoint = (
        None if resume == "none" else latest_checkpoint(run_dir) if resume == "auto" else Path(resume)
    )
    folders = [checkpoint / "model", checkpoint / "adapter"] if checkpoint else []
    saved = next((folder for folder in folders if (folder / "tokenizer.json").is_file()), None)
    return tokenizer if saved is None else tokenizer.with_bos(load_tokenizer(saved).adds_bos)


# ---- token ids that are handed on ----


class Beside(NamedTuple):
    """What reads the run's token ids, or has written them.

    setting: that names it.  directory: of its tokenizer, if it has one.  remedy: where ids mean something else to it.
    is_written: it holds ids that the run reads; else it reads those of the run.
    """

    setting: str
    directory: Path
    remedy: str
    is_written: bool = False

    @property
    def has_tokenizer(self) -> bool:
        return any((self.directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))


def check_token_ids(tokenizer: Tokenizer | None, named: Iterable[Beside]) -> None:
    """Raise InputError where an id means something else to one of them than to the run's tokenizer.

    Without a tokenizer, the first that has one says what ids mean. What has none of its own, nothing is known about.
    """
    seen = set[Path]()
    for beside in named:
        if not beside.has_tokenizer or beside.directory in seen:
            continue
        seen.add(beside.directory)
        other = load_tokenizer(beside.directory)
        tokenizer = tokenizer or other
        writer, reader = (other, tokenizer) if beside.is_written else (tokenizer, other)
        difference = writer.difference_from(reader)
        if difference is not None:
            raise InputError(
                f"{beside.setting}: the tokenizer in {beside.directory} is not the run's: {difference}; {beside.remedy}"
            )


def _handed_on(config: Config) -> Iterator[Beside]:
    """What the settings of any stage name: the weights to start from, and tokens that are read as they stand."""
    named, reads_tokens = config.data.tokenizer, config.reads == "tokens"
    if config.model.path is not None and (
        reads_tokens or named is not None
    ):  # else its tokenizer is the run's
        setting = "model.path" if named is None else "data.tokenizer"
        remedy = (
            "a model keeps the tokenizer that it was trained with: name that, or leave data.tokenizer out"
        )
        yield Beside(setting, hugging_face_directory(config.model.path), remedy)
    if config.lora.path is not None:
        remedy = "name adapters that were trained on this model, with its tokenizer"
        yield Beside("lora.path", adapter_directory(config.lora.path), remedy)
    if reads_tokens:
        yield from corpora(config.data.train, "data.train", "train")
        assert not isinstance(config.data.valid, float), "a share is of conversations"
        yield from corpora(config.data.valid, "data.valid", "valid")


def corpora(sources: Sequence[DataSource], setting: str, split: str) -> list[Beside]:
    """Of each source, the tokenizer that `llm3d data tokenize` has left beside its files."""
    remedy = "tokenize its text with the run's: llm3d data tokenize --tokenizer"
    return [
        Beside(f"{setting}[{i}]", Path(resolve_prefix(source.path, split)).parent / "tokenizer", remedy, True)
        for i, source in enumerate(sources)
    ]
