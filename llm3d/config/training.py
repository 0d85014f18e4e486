"""Settings of how long a run trains, at which learning rate, and how often it evaluates and saves."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

from pydantic import Field

from llm3d.config.base import Fraction, Name, Positive, Section, Share, Whole


class OptimConfig(Section):
    """AdamW and its learning rate."""

    lr: float = Field(gt=0)
    min_lr: float = Field(default_factory=lambda data: float(f"{0.1 * data['lr']:.15g}"), ge=0)
    """Least learning rate, where the schedule ends: one step after the last, which thus learns with min_lr 0, too.
    Default: 0.1 x lr."""
    warmup_steps: Whole = 0
    """Warm-up steps, over which the learning rate rises in a straight line to lr. Of a run with fewer: all."""
    warmup_ratio: Share | None = None
    """Warm-up ratio: the share of the run's steps, rounded up, in place of warmup_steps."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """Learning-rate schedule after the warm-up; constant: lr; wsd: lr, then a straight line over the decay."""
    decay_steps: Positive | None = None
    """Decay steps at the end of wsd. Default: a tenth of the run's steps."""
    decay_ratio: Share | None = None
    """Decay ratio: the share of the run's steps, rounded up, in place of decay_steps."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    clip_grad_norm: float | None = Field(1.0, gt=0)


class Interval(NamedTuple):
    """Between what comes again and again: so many steps, or so many epochs; without either it never comes."""

    steps: int | None
    epochs: float | None = None

    @property
    def is_given(self) -> bool:
        return self.steps is not None or self.epochs is not None

    def ends_at(self, step: int, epoch: Callable[[int], float | None]) -> bool:
        """Whether it comes after a step: the first with which so many steps, or epochs, are full.

        epoch: passes over the data that the run has done when a step is done.
        """
        if self.epochs is None:
            return self.steps is not None and step % self.steps == 0
        before, after = (math.floor(round((epoch(at) or 0.0) / self.epochs, 6)) for at in (step - 1, step))
        return after > before


class TrainConfig(Section):
    steps: Positive
    """Steps of the run, where the learning-rate schedule ends."""
    stop_after: Positive | None = None
    """Save and end after this step; the same command without it goes on. Null: train to the last."""
    eval_every: Positive | None = None
    """Evaluation interval in steps, on data.valid; the last step of the run has an evaluation, too. Null: none."""
    eval_steps: Positive | None = None
    """Evaluation batches, each as large as a step's. Null: all of data.valid."""
    patience: Positive | None = None
    """Early stopping patience: training ends after so many evaluations without a better checkpoint.best."""
    deterministic: bool = True
    """Deterministic algorithms on a GPU: the same run gives the same bits, and so does one that goes on. It costs time
    in attention's backward, and memory there: so many fp32 copies of the queries' gradient as the GPU has
    multiprocessors for each head of each sequence, rounded up. false: torch may take kernels that add up in any
    order."""

    @property
    def evaluations(self) -> Interval:
        return Interval(self.eval_every)


class EpochsConfig(TrainConfig):
    steps: Whole = 0
    """Steps of the run, where the learning-rate schedule ends. 0: as many as train.epochs take."""
    epochs: float | None = Field(None, gt=0)
    """Epochs, passes over the data, counted in samples: the last step takes what is left. Overridden by steps."""
    eval_every_epochs: float | None = Field(None, gt=0)
    """Evaluation interval in epochs, in place of eval_every; 0.5: twice in each pass over the data."""

    @property
    def evaluations(self) -> Interval:
        return Interval(self.eval_every, self.eval_every_epochs)


class CheckpointConfig(Section):
    every: Positive | None = None
    """Checkpoint interval in steps. Null: only at the end."""
    keep: Positive | None = None
    """How many of the latest to keep; the best stays beside them. Null: all."""
    resume: Name = "auto"
    """auto (the latest in run.dir), none, or the path of a checkpoint."""
    best: Name | None = None
    """Metric of the best checkpoint, such as valid_loss: an evaluation with a better value than all before is saved,
    and checkpoints/best leads to it. Null: none is sought."""
    greater_is_better: bool | None = None
    """Whether a greater value of that metric is better. Null: unless its name ends with loss or perplexity."""

    @property
    def saves(self) -> Interval:
        return Interval(self.every)


class EpochsCheckpointConfig(CheckpointConfig):
    every_epochs: float | None = Field(None, gt=0)
    """Checkpoint interval in epochs, in place of every."""

    @property
    def saves(self) -> Interval:
        return Interval(self.every, self.every_epochs)
