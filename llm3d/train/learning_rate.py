"""Learning-rate schedules as functions of the step."""

from __future__ import annotations

import math

from llm3d.config import OptimConfig


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """The rate of step 1 .. steps: linear warmup to lr, then towards min_lr, which the last step has.

    cosine: half a cosine wave (Loshchilov and Hutter 2017). linear: a straight line. constant: lr throughout.
    wsd: lr, then a straight line over the last `decay_steps` (Hu et al. 2024, MiniCPM; default a tenth of the steps).
    """
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    start = config.warmup_steps
    if config.schedule == "wsd":
        start = max(start, steps - (config.decay_steps or max(1, steps // 10)))
    progress = min(1.0, max(0.0, (step - start) / max(1, steps - start)))
    if config.schedule == "cosine":
        progress = (1 - math.cos(math.pi * progress)) / 2
    return config.lr + (config.min_lr - config.lr) * progress
