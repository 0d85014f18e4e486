"""What a stage trains on, as the trainer sees it; and the language models' own: the next token."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from llm3d.config import LossConfig
from llm3d.models.heads import HeadName
from llm3d.parallel.cross_entropy import TokenTerms, cross_entropy_sum


class Objective(Protocol):
    """Turns what the head says of a microbatch into numbers.

    head: which one the model has.  unit: what a term of the loss is, for people.
    sums: names of what is reported beside the loss, each a sum that is divided as the loss is.
    maxima: names of what is reported as the largest over all microbatches.
    """

    @property
    def head(self) -> HeadName: ...
    @property
    def unit(self) -> str: ...
    @property
    def sums(self) -> tuple[str, ...]: ...
    @property
    def maxima(self) -> tuple[str, ...]: ...

    def count(self, batch: Any) -> int:
        """How many terms of the loss a microbatch has: what its sum is divided by, over all microbatches of a step."""

    def __call__(self, output: Any, batch: Any) -> Tensor:
        """output: of the head (see llm3d.models.heads) -> fp32 [1 + sums + maxima], the loss first, as a sum.

        Only the loss has a gradient. Called without gradients in evaluations.
        """

    def report(self, means: dict[str, float]) -> dict[str, float]:
        """What users are shown of the loss and the other numbers, by name."""


class Tally(NamedTuple):
    """An objective's numbers over many microbatches."""

    sums: tuple[float, ...]  # the loss first
    maxima: tuple[float, ...]
    num_terms: int  # of the loss

    @property
    def loss(self) -> float:
        """Its mean."""
        return self.sums[0] / max(1, self.num_terms)

    def with_more(self, other: Tally) -> Tally:
        sums = tuple(a + b for a, b in zip(self.sums, other.sums, strict=True))
        maxima = tuple(max(a, b) for a, b in zip(self.maxima, other.maxima, strict=True))
        return Tally(sums, maxima, self.num_terms + other.num_terms)

    def report(self, objective: Objective) -> dict[str, float]:
        """By name, the loss first."""
        means = [total / max(1, self.num_terms) for total in self.sums]
        named = dict(zip(("loss", *objective.sums), means, strict=True))
        return objective.report(named | dict(zip(objective.maxima, self.maxima, strict=True)))


def names_of(objective: Objective) -> list[str]:
    """What its report has."""
    anything = Tally((1.0,) * (1 + len(objective.sums)), (1.0,) * len(objective.maxima), 1)
    return list(anything.report(objective))


def of_padding(output: Tensor, objective: Objective) -> Tensor:
    """What a microbatch of padding alone gives: a loss of 0 that hangs on the model, sums of 0, and no maximum."""
    loss = 0 * output.sum()
    maxima = loss.new_full((len(objective.maxima),), -torch.inf)
    return torch.cat([loss[None], loss.new_zeros(len(objective.sums)), maxima])


@dataclass(frozen=True)
class NextToken:
    """The cross-entropy of the next token; perplexity, and how often the likeliest token is the right one.

    loss: z-loss and label smoothing are part of what is trained, not of an evaluation.
    """

    vocab_size: int
    loss: LossConfig = field(default_factory=LossConfig)
    head: HeadName = "language"
    unit: str = "token"
    sums: tuple[str, ...] = ("token_accuracy",)
    maxima: tuple[str, ...] = ()

    def count(self, batch: Any) -> int:
        return batch.num_targets

    def __call__(self, output: TokenTerms, batch: Any) -> Tensor:
        regularizers = (self.loss.z_loss, self.loss.label_smoothing) if torch.is_grad_enabled() else ()
        loss = cross_entropy_sum(output, batch.targets, self.vocab_size, *regularizers)
        correct = ((output.below_maximum == 0) & (batch.targets >= 0)).sum()
        return torch.stack([loss, correct.to(loss.dtype)])

    def report(self, means: dict[str, float]) -> dict[str, float]:
        return means | {"perplexity": math.exp(min(means["loss"], 700.0))}
