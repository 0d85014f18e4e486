"""Learning-rate schedules as functions of the step."""

from __future__ import annotations

import math
from typing import NamedTuple

from llm3d.config import OptimConfig
from llm3d.wording import counted


class Phases(NamedTuple):
    """Steps of the warm-up, at the start, and of the decay, at the end; between them the rate is lr."""

    warmup: int
    decay: int


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """The rate of step 1 .. steps: a straight line up to lr over the warm-up, then from lr towards min_lr.

    The step after the last would have min_lr, so that the last step learns with min_lr 0, too. After the warm-up the
    rates are those of transformers' schedules.

    cosine: half a cosine wave (Loshchilov and Hutter 2017). linear: a straight line. constant: lr throughout.
    wsd: lr, then a straight line over the last decay_steps (Hu et al. 2024, MiniCPM).
    """
    warmup, decay = phases(steps, config)
    if step <= warmup:
        return config.lr * step / warmup
    progress = min(1.0, max(0.0, step - 1 - (steps - decay)) / max(1, decay))
    if config.schedule == "cosine":
        progress = (1 - math.cos(math.pi * progress)) / 2
    return config.lr + (config.min_lr - config.lr) * progress


def phases(steps: int, config: OptimConfig) -> Phases:
    """Both as the settings ask for them; where a run is too short, shortened in proportion."""
    requested = _requested(steps, config)
    warmup, decay = requested
    if warmup + decay > steps:
        warmup = warmup * steps // (warmup + decay)
        decay = min(decay, steps - warmup)
    return Phases(warmup, decay if config.schedule == "wsd" else _rest(steps - warmup, config))


def shortened(steps: int, config: OptimConfig) -> str | None:
    """What to tell a user whose warm-up or decay does not fit the run; None where all does."""
    requested, actual = _requested(steps, config), phases(steps, config)
    changed = [
        f"the {name} is shortened from {counted(given, 'step')} to {got}"
        for name, given, got in zip(("warm-up", "decay"), requested, actual, strict=True)
        if got < given
    ]
    return f"optim: in a run of {counted(steps, 'step')} {', '.join(changed)}" if changed else None


def _requested(steps: int, config: OptimConfig) -> Phases:
    """As the settings have it; of a decay that is all that follows the warm-up, 0."""
    warmup = config.warmup_steps
    if config.warmup_ratio is not None:
        warmup = _share(config.warmup_ratio, steps)
    if config.schedule != "wsd":
        return Phases(warmup, 0)
    if config.decay_ratio is not None:
        return Phases(warmup, _share(config.decay_ratio, steps))
    return Phases(warmup, config.decay_steps or max(1, steps // 10))


def _rest(steps: int, config: OptimConfig) -> int:
    return 0 if config.schedule == "constant" else steps


def _share(ratio: float, steps: int) -> int:
    """Rounded up, as transformers does."""
    return math.ceil(round(ratio * steps, 9))
