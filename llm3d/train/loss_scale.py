"""Dynamic loss scaling, which keeps small gradients within fp16's range. Micikevicius et al. 2018."""

from __future__ import annotations

from llm3d.config import LossScaleConfig


class LossScale:
    """What the loss is multiplied by before backward.

    It doubles after `growth_interval` steps without overflow. Of steps that overflow, and are skipped, the
    `hysteresis`-th since it last doubled and each one after it halve it, as in Megatron-LM.
    """

    def __init__(self, config: LossScaleConfig) -> None:
        self.config = config
        self.value = config.initial
        self._steps, self._tolerance = 0, config.hysteresis

    def update(self, overflowed: bool) -> None:
        """After each step, with what all ranks agree on."""
        if overflowed:
            self._steps = 0
            self._tolerance -= 1
            if self._tolerance <= 0:
                self.value /= 2
            return
        self._steps += 1
        if self._steps == self.config.growth_interval:
            self._steps, self._tolerance = 0, self.config.hysteresis
            self.value *= 2

    @property
    def underflowed(self) -> bool:
        """Whether it is so small that small gradients are lost: the gradients are not finite for another reason."""
        return self.value < self.config.minimum

    @property
    def state(self) -> dict[str, float]:
        """What a checkpoint holds."""
        return {"value": self.value, "steps": self._steps, "tolerance": self._tolerance}

    def restore(self, state: dict[str, float]) -> None:
        """Continue from what `state` gave."""
        self.value = max(float(state["value"]), self.config.minimum)  # saved as it fell below
        self._steps, self._tolerance = int(state["steps"]), int(state["tolerance"])
