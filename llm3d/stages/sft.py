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
from llm3d.stages.stage import ModelTask, Stage, one_model
from llm3d.text.chat_tokenizer import ChatTokenizer
from llm3d.text.streaming import Detokenizer
from llm3d.train.trainer import ShardedModel, next_token


def open_stage(config: SFTConfig, training: bool = True) -> ModelTask:
    """Open tokenizer, template and data. Raises InputError where they cannot be used."""
    config, tokenizer, data = open_chat(config, training, prompt_loss=config.sft.prompt_loss)
    show = partial(sample_reply, config=config, tokenizer=tokenizer, data=data)
    return ModelTask(config, tokenizer, data, next_token(config), show=show)


def sample_reply(
    model: ShardedModel, config: SFTConfig, tokenizer: ChatTokenizer, data: ChatData
) -> Sequence[str]:
    """What the model replies to the first validation prompt: the likeliest tokens, on every rank."""
    prompt = first_prompt(data)
    if not config.sft.sample_tokens or not len(prompt):
        return ()
    detokenizer = Detokenizer(tokenizer.tokenizer, end_ids(config, tokenizer.tokenizer, tokenizer.template))
    request = Request(prompt, config.sft.sample_tokens, detokenizer.ends, Sampling(temperature=0))
    writer = Generator(config.model, model.stages, model.mesh, model.dtype)
    ((reply,),) = writer.generate([request], max_sequences=1)
    question = Detokenizer(tokenizer.tokenizer, ()).text(prompt).strip()
    return [f"to ...{question[-60:]!r} it replies {detokenizer.text(reply.tokens)!r}"]


def first_prompt(data: ChatData) -> Sequence[int]:
    """The first validation sample up to its first reply; nothing where there is none, or all of it is learned."""
    valid = data.sets[data.num_train :]
    if not valid:
        return ()
    (ids, is_target), *_ = valid[0][0].sequences
    return ids[: int(np.argmax(is_target))].tolist()


STAGE = Stage(SFTConfig, open_stage, one_model(next_token))
