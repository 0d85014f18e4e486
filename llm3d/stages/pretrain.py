"""Causal language modelling from tokenized text: next-token cross-entropy, from random or given weights."""

from __future__ import annotations

from llm3d.config import PretrainConfig
from llm3d.data.language import LanguageData, ValidationData
from llm3d.data.run_tokenizer import open_tokenizer
from llm3d.stages.stage import ModelTask, Stage, one_model
from llm3d.train.trainer import next_token


def open_stage(config: PretrainConfig, training: bool = True) -> ModelTask:
    """Open tokenizer and data. Raises InputError where they cannot be used.

    The tokenizer that is saved adds bos to a text where the documents that are learned begin with it.
    """
    config, tokenizer = open_tokenizer(config)
    if not training:
        return ModelTask(config, tokenizer, ValidationData(config), next_token(config))
    data = LanguageData(config)
    if tokenizer is not None and tokenizer.bos_id is not None:
        tokenizer = tokenizer.with_bos(data.train.starts_with(tokenizer.bos_id))
    return ModelTask(config, tokenizer, data, next_token(config))


STAGE = Stage(PretrainConfig, open_stage, one_model(next_token))
