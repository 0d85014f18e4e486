"""A tokenizer with the chat template of its conversations."""

from __future__ import annotations

from pathlib import Path

from llm3d.files import read_json, write_json
from llm3d.text.templates import Template
from llm3d.text.tokenizer import Tokenizer


class ChatTokenizer:
    """A tokenizer with the template that conversations were put in.

    pad_id: of what transformers is to pad with, where that is not for the tokenizer's own files to say.
    """

    def __init__(self, tokenizer: Tokenizer, template: Template, pad_id: int | None = None) -> None:
        self.tokenizer, self.template, self.pad_id = tokenizer, template, pad_id

    @property
    def bos_id(self) -> int | None:
        return self.tokenizer.bos_id

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The tokens at which generation ends: eos, and the template's end of a reply."""
        return tuple(
            dict.fromkeys((*self.tokenizer.end_ids, self.template.end_id, *sorted(self.template.end_ids)))
        )

    @property
    def remarks(self) -> tuple[str, ...]:
        """What a user should know about the two, for people."""
        return (*self.tokenizer.remarks, *self.template.remarks)

    def save_to(self, directory: Path) -> None:
        """Write the files that transformers' AutoTokenizer loads, the template among them.

        As TRL has it, eos is the end of a reply (unless the template writes eos for something else), and where
        padding has no token, it has what was eos before.
        """
        self.tokenizer.save_to(directory)
        self.template.save_to(directory)
        file, token = directory / "tokenizer_config.json", self.tokenizer.token
        config = read_json(file)
        pad = config.get("pad_token") or config.get("eos_token")
        pad = pad if self.pad_id is None else token(self.pad_id)
        end = config["eos_token"] if "eos_token" in self.template.source else token(self.template.end_id)
        write_json(file, config | {"eos_token": end, "pad_token": pad})
