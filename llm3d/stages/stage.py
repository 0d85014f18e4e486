"""A training stage as an object: its settings, how they are opened, what learns, and which models it has.

Each stage is a file of its name in this folder, which holds a `STAGE`.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeVar

import numpy as np

from llm3d.config import Config
from llm3d.data.packed import PackedBatch, collate, with_noise
from llm3d.data.samples import Sample, Tokens
from llm3d.data.steps import Consumed
from llm3d.parallel.mesh import Mesh
from llm3d.text.chat_tokenizer import ChatTokenizer
from llm3d.text.tokenizer import Tokenizer
from llm3d.train.learner import Learner, ModelLearner, Reference
from llm3d.train.loop import TrainingData
from llm3d.train.objective import Objective, names_of
from llm3d.train.trainer import ShardedModel, Trainer

C = TypeVar("C", bound=Config)
C_contra = TypeVar("C_contra", bound=Config, contravariant=True)


class OpenStage(Protocol[C_contra]):
    def __call__(self, config: C_contra, training: bool = True) -> Task:
        """Open what the settings name. Raises InputError where it cannot be used.

        training: False: validation data alone, and what an evaluation asks.
        """


@dataclass(frozen=True)
class Stage(Generic[C]):
    """open: see `OpenStage`.  models: that a run holds, which need not be there: for planning."""

    config: type[C]
    open: OpenStage[C]
    models: Callable[[C], Models]


def stage_of(config: Config) -> Stage[Any]:
    """The stage whose settings these are."""
    stage = importlib.import_module(f"llm3d.stages.{config.stage}").STAGE
    assert isinstance(stage, Stage)
    return stage


# ---- what the settings name, opened ----


class StageData(TrainingData, Protocol):
    """What a stage's data do beside giving microbatches."""

    @property
    def digest(self) -> str:
        """What the order of samples depends on."""

    def resume(self, step: int, consumed: Consumed) -> None:
        """Go on after `step`, by which the run had read `consumed`."""

    def introduction(self, mesh: Mesh) -> list[str]:
        """What the run is going to read, for people."""


class Task(Protocol):
    """What a stage's settings name, opened and found usable."""

    @property
    def config(self) -> Config:
        """The settings, with what only the opened things could tell."""

    @property
    def tokenizer(self) -> Tokenizer | ChatTokenizer | None: ...
    @property
    def data(self) -> Any:
        """`StageData`; opened for an evaluation, `llm3d.train.loop.EvaluationData`."""

    @property
    def validation_names(self) -> Sequence[str]:
        """The numbers of an evaluation."""

    def learner(self, mesh: Mesh, training: bool = True) -> Learner:
        """The models, without their first weights."""


@dataclass(frozen=True)
class ModelTask:
    """A `Task` of one model that learns an objective.

    reference: makes the frozen model that it is compared with.  show: see `ModelLearner`.
    """

    config: Config
    tokenizer: Tokenizer | ChatTokenizer | None
    data: Any
    objective: Objective
    reference: Callable[[ShardedModel], Reference] | None = None
    show: Callable[[ShardedModel], Sequence[str]] | None = None

    @property
    def validation_names(self) -> Sequence[str]:
        return names_of(self.objective)

    def learner(self, mesh: Mesh, training: bool = True) -> ModelLearner:
        model = (Trainer if training else ShardedModel)(self.config, mesh, self.objective)
        return ModelLearner(model, self.reference(model) if self.reference else None, self.show)


# ---- its models, for planning ----


class ModelRole(NamedTuple):
    """A model that a run holds.

    kind: trained; frozen; or rollout: the policy again, in the layout that writes replies.
    microbatch: the largest that goes through it, without content.  averaged: an average of its weights is kept.
    """

    name: str
    kind: Literal["trained", "frozen", "rollout"]
    config: Config
    objective: Objective
    microbatch: PackedBatch
    averaged: bool = False


class Models(NamedTuple):
    """The first is the one that the run is about.  remarks: what a user should know of them."""

    roles: list[ModelRole]
    remarks: Sequence[str] = ()


def one_model(objective: Callable[[C], Objective]) -> Callable[[C], Models]:
    """For a stage that trains one model and has no other."""

    def models(config: C) -> Models:
        return Models([ModelRole("model", "trained", config, objective(config), largest_microbatch(config))])

    return models


def largest_microbatch(config: Config) -> PackedBatch:
    """The most that goes through the model at once, without content: batch.micro of the longest sequences.

    Replies to compare come in pairs, so the last pair of an odd number is half as long.
    """
    micro, length = config.batch.micro, config.data.sequence_length
    if config.reads == "comparison":
        lengths = [length] * (micro // 2) + [length // 2] * (micro % 2)
        samples = [Sample((_blank(n), _blank(n)), (0.0, 1.0)) for n in lengths if n]
    else:
        samples = [Sample((_blank(length),))] * micro
    batch = replace(collate(samples, config.parallel.token_multiple), step_samples=1)
    if config.neftune_alpha or config.lora.dropout:
        noise = config.neftune_alpha / math.sqrt(config.model.hidden_size)
        batch = with_noise(batch, range(batch.num_sequences), noise)
    return batch


def _blank(length: int) -> Tokens:
    return Tokens(np.zeros(length, dtype=np.int32), np.ones(length, dtype=bool))
