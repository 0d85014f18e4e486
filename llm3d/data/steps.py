"""Which samples each step of a run takes. What a run has read is counted in samples, whatever its steps held."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

from llm3d.config import PostTrainingConfig


@dataclass(frozen=True)
class Steps:
    """Steps of batch.global samples each, from where the run starts or goes on.

    size: samples a step.  end: the samples after which the run ends; its last step takes what is left. None: it ends
    after `last_given` steps.  step, samples: done and read before.  a_pass: samples in a pass over the data, where
    there is such a number.
    """

    size: int
    last_given: int = 0
    end: int | None = None
    step: int = 0
    samples: int = 0
    a_pass: float | None = None

    @classmethod
    def of(cls, config: PostTrainingConfig, samples_a_pass: float) -> Steps:
        """From the first sample to train.steps, or to the end of train.epochs over the data."""
        train, size = config.train, config.batch.global_size
        if train.steps:
            return cls(size, last_given=train.steps, a_pass=samples_a_pass)
        assert train.epochs, "checked with the settings"
        samples = round(train.epochs * samples_a_pass, 9)  # 1.1 x 100 is a little above 110
        return cls(size, end=max(1, math.ceil(samples)), a_pass=samples_a_pass)

    def after(self, step: int, samples: int) -> Steps:
        """The same run from `step` on, by which it had read so many samples."""
        return replace(self, step=step, samples=samples)

    def read_by(self, step: int) -> int:
        """The samples that the run has read when `step` is done."""
        read = self.samples + (step - self.step) * self.size
        return read if self.end is None else min(read, max(self.end, self.samples))

    def epoch(self, step: int) -> float | None:
        """Passes over the data that the run has done when `step` is done; None where they are not counted."""
        return None if self.a_pass is None else self.read_by(step) / self.a_pass

    def numbers(self, step: int) -> range:
        """The samples of a step, numbered over the run."""
        return range(self.read_by(step - 1), self.read_by(step))

    def repetition(self) -> str | None:
        """What to tell a user whose steps are larger than a pass over the data; None where they are not."""
        step = len(self.numbers(self.step + 1))
        if self.a_pass is None or step <= math.ceil(self.a_pass):
            return None
        return (
            f"batch.global: a step of {step:,} is more than the {math.ceil(self.a_pass):,} of a pass over the data, "
            "so it reads some more than once; a lower batch.global makes more steps"
        )

    def schedule(self, step: int) -> tuple[int, int]:
        """Where the learning-rate schedule is at `step`, and its length, in steps of `size` samples.

        A run that ends after so many samples follows them: with another batch it goes on from where it was.
        """
        if self.end is None:
            return step, self.last_given
        return math.ceil(self.read_by(step) / self.size), math.ceil(self.end / self.size)

    @property
    def last(self) -> int:
        """The step at which the run ends."""
        if self.end is None:
            return self.last_given
        return self.step + math.ceil(max(0, self.end - self.samples) / self.size)


class Consumed(NamedTuple):
    """What a run has read."""

    samples: int
    tokens: int
