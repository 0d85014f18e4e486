"""Supervised fine-tuning: the next token of the replies in conversations, from a given model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from llm3d.config import SFTConfig
from llm3d.data.conversations import ChatData, open_chat
from llm3d.data.run_tokenizer import end_ids
from llm3d.generate.engine import Generator
from llm3d.generate.sampling import Sampling
from llm3d.generate.scheduler import Request
from llm3d.stages.chat import OpenedChat
from llm3d.text.chat_tokenizer import ChatTokenizer
from llm3d.text.streaming import Replies
from llm3d.train.trainer import Evaluator, next_token


def open_stage(config: SFTConfig) -> OpenedChat:
    """Open what the settings name: tokenizer, template, data. Raises InputError where it cannot be used."""
    config, tokenizer, data = open_chat(config, "conversation", prompt_loss=config.sft.prompt_loss)
    opened = OpenedChat(config, tokenizer, data, next_token(config))
    return opened._replace(remarks=partial(sample_reply, config=config, tokenizer=tokenizer, data=data))


def sample_reply(
    model: Evaluator, config: SFTConfig, tokenizer: ChatTokenizer, data: ChatData
) -> Sequence[str]:
    """What the model replies to the first validation prompt: the likeliest tokens, on every rank."""
    prompt = first_prompt(data)
    if not config.sft.sample_tokens or not len(prompt):
        return ()
    replies = Replies(tokenizer.tokenizer, end_ids(config, tokenizer.tokenizer, tokenizer.template))
    request = Request(prompt, config.sft.sample_tokens, replies.ends, Sampling(temperature=0))
    writer = Generator(config.model, model.stages, model.mesh, model.dtype)
    ((reply,),) = writer.generate([request], max_sequences=1)
    question = Replies(tokenizer.tokenizer, ()).text(prompt).strip()
    return [f"to ...{question[-60:]!r} it replies {replies.text(reply.tokens)!r}"]


def first_prompt(data: ChatData) -> Sequence[int]:
    """The first validation sample up to its first reply; nothing where there is none, or all of it is learned."""
    valid = data.sets[data.num_train :]
    if not valid:
        return ()
    (ids, is_target), *_ = valid[0][0].sequences
    return ids[: int(np.argmax(is_target))].tolist()
