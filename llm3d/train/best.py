"""The best checkpoint by a validation number, and when training ends because none has become better."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llm3d.config import Config

_LESS_IS_BETTER = ("loss", "perplexity")


@dataclass
class Best:
    """The best value of a metric so far. Every rank holds one, and all see the same numbers.

    name: of the metric; None: nothing is watched.  waited: evaluations since `step`, which had the best value.
    """

    name: str | None = None
    greater_is_better: bool = False
    patience: int | None = None
    value: float | None = None
    step: int = 0
    waited: int = 0

    @classmethod
    def of(cls, config: Config) -> Best:
        """As the settings ask for it."""
        name, greater = config.checkpoint.best, config.checkpoint.greater_is_better
        if name is not None and greater is None:
            greater = not name.endswith(_LESS_IS_BETTER)
        return cls(name, bool(greater), config.train.patience)

    def see(self, step: int, metrics: Mapping[str, Any]) -> bool:
        """Take note of an evaluation; -> whether it is the best so far. One that is not finite never is."""
        if self.name is None:
            return False
        value = metrics[self.name]
        improved = self.value is None or (
            value > self.value if self.greater_is_better else value < self.value
        )
        if improved and math.isfinite(value):
            self.value, self.step, self.waited = value, step, 0
            return True
        self.waited += 1
        return False

    @property
    def has_waited_enough(self) -> bool:
        """Whether training ends here."""
        return self.patience is not None and self.waited >= self.patience

    @property
    def state(self) -> dict[str, Any]:
        """JSON; {} where nothing is watched."""
        watched = ("name", "greater_is_better", "value", "step", "waited")
        return {} if self.name is None else {name: getattr(self, name) for name in watched}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state`; that of another metric is of no use."""
        if (state.get("name"), state.get("greater_is_better")) == (self.name, self.greater_is_better):
            self.value, self.step, self.waited = state["value"], state["step"], state["waited"]

    def __str__(self) -> str:
        return f"the best {self.name} is {self.value:.4f}, at step {self.step}"
