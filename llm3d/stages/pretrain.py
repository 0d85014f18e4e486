"""Causal language modelling from tokenised text: next-token cross-entropy, from random or given weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from llm3d.config import PretrainConfig
from llm3d.data.language import LanguageData
from llm3d.data.run_tokenizer import open_tokenizer
from llm3d.parallel.mesh import Mesh
from llm3d.text.tokenizer import Tokenizer
from llm3d.train.objective import NextToken, names_of
from llm3d.train.trainer import Evaluator, Trainer, next_token


class Pretraining(NamedTuple):
    config: PretrainConfig
    tokenizer: Tokenizer | None
    data: LanguageData
    objective: NextToken

    @property
    def validation_names(self) -> Sequence[str]:
        return names_of(self.objective)

    def trainer(self, mesh: Mesh) -> Trainer:
        return Trainer(self.config, mesh, self.objective)

    def prepare(self, trainer: Trainer) -> None:
        pass

    def remarks(self, model: Evaluator) -> Sequence[str]:
        return ()


def open_stage(config: PretrainConfig) -> Pretraining:
    """Open what the settings name: tokenizer, data. Raises InputError where it cannot be used.

    The tokenizer that is saved adds bos to a text where the documents that are learned begin with it.
    """
    config, tokenizer = open_tokenizer(config)
    data = LanguageData(config)
    if tokenizer is not None and tokenizer.bos_id is not None:
        tokenizer = tokenizer.with_bos(data.train.starts_with(tokenizer.bos_id))
    return Pretraining(config, tokenizer, data, next_token(config))
