"""What a run trains: one model or several, and how the samples of a step become updates of their weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from llm3d.models.batch import Batch
from llm3d.train.trainer import Notice, ShardedModel, StepResult, Trainer


class Evaluation(NamedTuple):
    """Numbers of validation data, by name; num_terms: of what they are means, each a `unit`."""

    numbers: dict[str, float]
    num_terms: int
    unit: str


class Learner(Protocol):
    """What the loop trains. Every rank of a mesh holds one and calls it at the same time."""

    @property
    def model(self) -> ShardedModel:
        """The model that the run is about; where it is trained, a Trainer."""

    @property
    def trainer(self) -> Trainer:
        """The same, where it is trained."""

    @property
    def others(self) -> Mapping[str, Trainer]:
        """Models that are trained along with it, by the folder that each has in a checkpoint."""

    def prepare(self) -> None:
        """Load what stands beside the model. Called once, before the model's own weights are loaded."""

    def step(self, batch: Sequence[Any], lr: float, tell: Callable[[], Notice] | None = None) -> StepResult:
        """Learn from what the data give for a step; see `Trainer.step`. Raises InputError before any weight changes."""

    def evaluate(self, batches: Iterable[Sequence[Any]]) -> Evaluation:
        """The numbers of validation data."""

    def examples(self) -> Sequence[str]:
        """Lines that show what the model does, for people, after an evaluation."""

    def introduction(self) -> Sequence[str]:
        """Lines about the models, for people, before training."""

    def flops(self, batch: Sequence[Any], num_tokens: float) -> float | None:
        """Of a step with so many tokens, on all devices; None where no one figure says much."""

    @property
    def state(self) -> dict[str, Any]:
        """What training changes beside weights and optimizer state; JSON."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint's state, of which `state` was a part."""


class Reference(Protocol):
    """A frozen model that the trained one is compared with."""

    def prepare(self) -> None:
        """See `Learner.prepare`."""

    def complete(self, microbatches: Sequence[Any]) -> Sequence[Any]:
        """Microbatches, on the device, with what only the reference can tell."""


class ModelLearner:
    """A `Learner` of one model, which learns from microbatches as they are, or completed by a reference.

    show: lines for `Learner.examples`.
    """

    def __init__(
        self,
        model: ShardedModel,
        reference: Reference | None = None,
        show: Callable[[ShardedModel], Sequence[str]] | None = None,
    ) -> None:
        self.model, self.reference, self.show = model, reference, show
        self.others: Mapping[str, Trainer] = {}

    @property
    def trainer(self) -> Trainer:
        assert isinstance(self.model, Trainer)
        return self.model

    def prepare(self) -> None:
        if self.reference is not None:
            self.reference.prepare()

    def _complete(self, microbatches: Sequence[Batch]) -> Sequence[Batch]:
        if self.reference is None:
            return microbatches
        return self.reference.complete(self.model.on_device(microbatches))

    def step(self, batch: Sequence[Batch], lr: float, tell: Callable[[], Notice] | None = None) -> StepResult:
        return self.trainer.step(self._complete(batch), lr, tell)

    def evaluate(self, batches: Iterable[Sequence[Batch]]) -> Evaluation:
        tally, objective = self.model.evaluate_all(map(self._complete, batches)), self.model.objective
        return Evaluation(tally.report(objective), tally.num_terms, objective.unit)

    def examples(self) -> Sequence[str]:
        return self.show(self.model) if self.show is not None else ()

    def introduction(self) -> Sequence[str]:
        return ()

    def flops(self, batch: Sequence[Batch], num_tokens: float) -> float | None:
        return self.trainer.flops(batch, num_tokens)

    @property
    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        pass
