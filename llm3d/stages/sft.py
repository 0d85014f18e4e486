"""Supervised fine-tuning: the next token of the replies in conversations, from a given model."""

from __future__ import annotations

from llm3d.config import SFTConfig
from llm3d.stages.chat_data import OpenedChat, open_chat
from llm3d.train.trainer import next_token


def open_stage(config: SFTConfig) -> OpenedChat:
    """Open what the settings name: tokenizer, template, data. Raises InputError where it cannot be used."""
    config, tokenizer, data = open_chat(config, "conversation", prompt_loss=config.sft.prompt_loss)
    return OpenedChat(config, tokenizer, data, next_token(config))
