"""The tokenizer that a run's settings name, and its tokens that end a reply."""

from __future__ import annotations

from typing import TypeVar

from llm3d.config import ChatDataConfig, Config, with_vocab_size
from llm3d.config.hugging_face import hugging_face_directory
from llm3d.data.templates import Template
from llm3d.data.tokenizer import Tokenizer, load_tokenizer
from llm3d.errors import InputError

C = TypeVar("C", bound=Config)


def end_ids(config: Config, tokenizer: Tokenizer, template: Template | None) -> set[int]:
    """Tokens that end a reply: the model's, the tokenizer's, and the template's."""
    of_model = config.model.eos_token_id
    several = of_model if isinstance(of_model, tuple) else (of_model,)
    known = (*several, tokenizer.eos_id, template.end_id if template else None)
    return {token for token in known if token is not None}


def open_tokenizer(config: C) -> tuple[C, Tokenizer | None]:
    """The run's tokenizer, if it has one; its size becomes model.vocab_size where that is not set.

    Raises InputError where the two disagree.
    """
    path = config.data.tokenizer
    if path is None and isinstance(config.data, ChatDataConfig) and config.model.path is not None:
        path = str(hugging_face_directory(config.model.path))
    if path is None:
        if config.model.vocab_size is None:
            raise InputError("model.vocab_size: not set; set it, or data.tokenizer, which tells it")
        return config, None
    tokenizer = load_tokenizer(path)
    if config.model.vocab_size is None:
        return with_vocab_size(config, tokenizer.vocab_size), tokenizer
    if tokenizer.vocab_size > config.model.vocab_size:
        raise InputError(
            f"data.tokenizer: {path} has {tokenizer.vocab_size} tokens, more than "
            f"model.vocab_size {config.model.vocab_size}; give the model's own tokenizer, or a larger vocab_size"
        )
    return config, tokenizer
