"""What a model says of sequences under any layout, adapters included: on each rank of the pool."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from llm3d.checkpoint.save import save_checkpoint
from llm3d.checkpoint.starting import load_first_weights
from llm3d.config import STAGES, make_config
from llm3d.data.packed import PackedBatch, collate
from llm3d.data.samples import Sample, Tokens
from llm3d.parallel.cross_entropy import TokenTerms
from llm3d.parallel.mesh import Mesh
from llm3d.train.trainer import ShardedModel, Trainer
from tests.stages.common import Settings, trained_model
from tests.stages.post_training import opened_task

Ids = Sequence[Sequence[int]]


def said_on_rank(stage: str, given: Settings, ids: Ids) -> Tensor | None:
    """By the model that the settings name, on the last pipeline stage: see `numbers`."""
    config = make_config(given, dist.get_world_size(), STAGES[stage])
    model = ShardedModel(
        config, Mesh(config.parallel.tensor, config.parallel.pipeline), trained_model(config).objective
    )
    load_first_weights(model)
    return said(model, ids)


def trained_and_said_on_rank(stage: str, given: Settings, ids: Ids, steps: int = 2) -> Tensor | None:
    """The same after a few steps of training, saved in run.dir."""
    opened = opened_task(stage, given)
    config = opened.config
    trainer = Trainer(config, Mesh(config.parallel.tensor, config.parallel.pipeline), opened.objective)
    load_first_weights(trainer)
    for step in range(1, steps + 1):
        trainer.step(opened.data.microbatches(step, trainer.mesh), lr=1e-2)
    save_checkpoint(Path(config.run.dir), steps, trainer, {}, opened.tokenizer)
    return said(trainer, ids)


def said(model: ShardedModel, ids: Ids) -> Tensor | None:
    sequences = [Tokens(np.array(tokens, dtype=np.int32), np.ones(len(tokens), dtype=bool)) for tokens in ids]
    multiple_of = model.mesh.tensor_size if model.config.parallel.sequence else 1
    samples = [Sample((sequence,)) for sequence in sequences]
    # As many microbatches as there are ranks for, all alike: the data ranks would else wait for each other.
    outputs = model.outputs([collate(samples, multiple_of)], numbers)
    return outputs[0] if outputs else None


def numbers(output: TokenTerms | Tensor, batch: PackedBatch) -> Tensor:
    """A reward for each sequence; of a language model, for each token that has a next one: its logit, the
    logarithm of the sum of all exponentiated logits, and the sum of the logits.
    """
    if isinstance(output, Tensor):
        return output[batch.last_tokens]
    logit = output.log_probabilities + output.log_normalizer
    terms = torch.stack([logit, output.log_normalizer, output.sum_of_logits], dim=1)
    return terms[batch.targets >= 0]


def by_transformers(model: torch.nn.Module, ids: Ids) -> Tensor:
    """The same of a language model of transformers, a sequence at a time."""
    found = []
    with torch.no_grad():
        for tokens in ids:
            logits = model(torch.tensor([tokens])).logits[0, :-1]
            following = logits.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
            found.append(torch.stack([following, logits.logsumexp(1), logits.sum(1)], dim=1))
    return torch.cat(found)
