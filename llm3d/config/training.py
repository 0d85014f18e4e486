"""Settings of how long a run trains, at which learning rate, and how often it evaluates and saves."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

from pydantic import Field

from llm3d.config.base import Fraction, Name, Positive, Section, Share, Whole


class OptimConfig(Section):
    """AdamW and its learning-rate schedule."""

    lr: float = Field(gt=0)
    """Learning rate, at its peak."""
    min_lr: float = Field(default_factory=lambda data: float(f"{0.1 * data['lr']:.15g}"), ge=0)
    """Minimum learning rate, where the schedule ends: one step after the last, which thus learns with min_lr 0, too.
    Default: 0.1 x lr."""
    warmup_steps: Whole = 0
    """Warm-up steps: the learning rate rises linearly to lr over them. A run with fewer steps warms up over all."""
    warmup_ratio: Share | None = None
    """Warm-up ratio: the share of the run's steps, rounded up, in place of warmup_steps."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """Learning-rate schedule after the warm-up. cosine, linear: down to min_lr; wsd: lr, then a linear decay over
    decay_steps; constant: lr."""
    decay_steps: Positive | None = None
    """Decay steps at the end of wsd. Default: a tenth of the run's steps."""
    decay_ratio: Share | None = None
    """Decay ratio: the share of the run's steps, rounded up, in place of decay_steps."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """AdamW betas: the decay rates of the first and the second moment."""
    eps: float = Field(1e-8, gt=0)
    """AdamW epsilon: added to the root of the second moment."""
    weight_decay: float = Field(0.1, ge=0)
    """Weight decay, decoupled: multiplied by the learning rate; norms have none."""
    clip_grad_norm: float | None = Field(1.0, gt=0)
    """Gradient clipping: the maximum norm of a step's gradient. Null: not clipped."""


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
    """Length of the run, evaluations, early stopping."""

    steps: Positive
    """Training steps of the run, where the learning-rate schedule ends."""
    stop_after: Positive | None = None
    """Stop after this step: the run is saved and ends, and the same command without it goes on. Null: train to the last
    step."""
    eval_every: Positive | None = None
    """Evaluation interval, steps, on data.valid; the last step of the run has an evaluation, too. Null: none."""
    eval_steps: Positive | None = None
    """Evaluation batches, each as large as a step's. Null: all of data.valid."""
    patience: Positive | None = None
    """Early stopping patience, evaluations: training ends after so many without a better checkpoint.best. Null: it does
    not."""
    deterministic: bool = True
    """Deterministic algorithms on a GPU: the same run gives the same bits, and so does one that goes on. It costs time
    in attention's backward, and memory there: so many fp32 copies of the queries' gradient as the GPU has
    multiprocessors for each head of each sequence, rounded up. false: torch may take kernels that add up in any
    order."""

    @property
    def evaluations(self) -> Interval:
        return Interval(self.eval_every)


class EpochsConfig(TrainConfig):
    """Length of the run in steps or epochs, evaluations, early stopping."""

    steps: Whole = 0
    """Training steps of the run, where the learning-rate schedule ends. 0: as many as train.epochs take."""
    epochs: float | None = Field(None, gt=0)
    """Training epochs, passes over the data, counted in samples: the last step takes what is left. Overridden by
    steps."""
    eval_every_epochs: float | None = Field(None, gt=0)
    """Evaluation interval, epochs, in place of eval_every; 0.5: twice in each pass over the data."""

    @property
    def evaluations(self) -> Interval:
        return Interval(self.eval_every, self.eval_every_epochs)


class CheckpointConfig(Section):
    """Checkpoints: the interval between them, which are kept, which one a run starts from."""

    every: Positive | None = None
    """Checkpoint interval, steps. Null: only at the end."""
    keep: Positive | None = None
    """Checkpoints to keep: the number of the latest ones; the best one stays beside them. Null: all."""
    resume: Name = "auto"
    """Resume from auto (the latest checkpoint in run.dir), none, or the path of a checkpoint."""
    best: Name | None = None
    """Metric of the best checkpoint, such as valid_loss: an evaluation with a better value than all before is saved,
    and checkpoints/best leads to it. Null: none is sought."""
    greater_is_better: bool | None = None
    """Greater is better: the direction of that metric. Null: true unless its name ends with loss or perplexity."""

    @property
    def saves(self) -> Interval:
        return Interval(self.every)


class EpochsCheckpointConfig(CheckpointConfig):
    """Checkpoints: the interval between them, which are kept, which one a run starts from."""

    every_epochs: float | None = Field(None, gt=0)
    """Checkpoint interval, epochs, in place of every."""

    @property
    def saves(self) -> Interval:
        return Interval(self.every, self.every_epochs)
