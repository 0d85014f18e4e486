"""The training loop: what it saves, evaluates and writes down, and how it ends."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from llm3d.config import PretrainConfig
from llm3d.data.pretraining import Microbatch
from llm3d.data.prompts import TokenizedPrompt
from llm3d.errors import InputError, Interrupted, TrainingAborted
from llm3d.parallel.mesh import Mesh, start_process_group
from llm3d.train.best import Best
from llm3d.train.learner import Evaluation, ModelLearner
from llm3d.train.loop import in_pinned_memory, read_microbatches, train
from llm3d.train.objective import NextToken
from llm3d.train.report import METRICS, Report
from llm3d.train.trainer import Trainer
from tests.parity.harness import settings
from tests.train.data import LAYOUT, TOKENS, Data


@pytest.fixture(autouse=True)
def world_of_one(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("RANK", raising=False)
    start_process_group()
    yield
    dist.destroy_process_group()


class Watched(Trainer):
    """A trainer that calls `during[n]` after the backward pass of its n-th step."""

    def __init__(self, config: PretrainConfig, mesh: Mesh) -> None:
        super().__init__(config, mesh)
        self.initialize()
        self.steps_done = 0
        self.during: dict[int, Callable[[], None]] = {}
        self.loss_factor = 1.0
        run = self.pipeline.run

        def run_and_interfere(*args: Any, **kwargs: Any) -> list[Tensor] | None:
            numbers = run(*args, **kwargs)
            assert numbers is not None
            if torch.is_grad_enabled():
                self.steps_done += 1
                self.loss_factor = 1.0
                self.during.get(self.steps_done, lambda: None)()
                numbers = [number * self.loss_factor for number in numbers]
            return numbers

        self.pipeline.run = run_and_interfere  # type: ignore[method-assign]


class Run:
    """A run in a directory; `saved` holds the weights at each call of save."""

    def __init__(self, directory: Path, **changes: dict[str, Any]) -> None:
        config = settings(LAYOUT)
        for section, values in changes.items():
            changed = getattr(config, section).model_copy(update=values)
            config = config.model_copy(update={section: changed})
        self.directory, self.trainer = directory, Watched(config, Mesh())
        self.learner = ModelLearner(self.trainer)
        self.saved: list[tuple[int, Tensor]] = []

    def train(self, start_step: int = 0, best: Best | None = None) -> None:
        data = Data(self.trainer.config.train.steps)
        with Report(self.directory, start_step, data.steps.last, speaks=True, tensorboard=False) as report:
            train(self.learner, data, report, start_step, self.save, best=best)

    def save(self, step: int) -> Path:
        self.saved.append((step, self.weights()))
        return self.directory / f"step-{step}"

    def weights(self) -> Tensor:
        return torch.cat(self.trainer.optimizer.master)

    @property
    def saved_steps(self) -> list[int]:
        return [step for step, _ in self.saved]

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.directory / METRICS).read_text().splitlines()]


def test_every_step_is_written_down_and_the_last_is_saved(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.train()
    assert run.saved_steps == [5]
    assert [(line["step"], line["tokens"], line["samples"]) for line in run.metrics] == [
        (step, step * TOKENS, step * 8) for step in range(1, 6)
    ]
    for line in run.metrics:
        numbers = (
            "loss",
            "lr",
            "grad_norm",
            "step_time_s",
            "tokens_per_s",
            "tflops_per_device",
            "memory_gib",
        )
        assert all(line[name] > 0 for name in numbers)
        assert line["mfu"] is None, "of a CPU no peak is known"
        assert line["tokens_per_s"] == pytest.approx(TOKENS / line["step_time_s"])
        assert "valid_loss" not in line


def test_a_run_in_two_parts_trains_as_one_without_a_break(tmp_path: Path) -> None:
    unbroken, parts = Run(tmp_path / "unbroken"), Run(tmp_path / "parts")
    for run in (unbroken, parts):
        run.directory.mkdir()
    unbroken.train()
    parts.trainer.config = with_train(parts.trainer.config, stop_after=2)
    parts.train()
    assert parts.saved_steps == [2]
    parts.trainer.config = with_train(parts.trainer.config, stop_after=None)
    parts.train(start_step=2)
    assert parts.saved_steps == [2, 5]
    assert [(line["step"], line["loss"], line["lr"]) for line in parts.metrics] == [
        (line["step"], line["loss"], line["lr"]) for line in unbroken.metrics
    ]
    assert torch.equal(parts.weights(), unbroken.weights())


def with_train(config: PretrainConfig, **changes: Any) -> PretrainConfig:
    return config.model_copy(update={"train": config.train.model_copy(update=changes)})


def test_checkpoints_and_lines_come_as_often_as_asked(tmp_path: Path) -> None:
    run = Run(tmp_path, checkpoint={"every": 2}, log={"every": 3})
    run.train()
    assert run.saved_steps == [2, 4, 5]
    assert [line["step"] for line in run.metrics] == [3, 5]


def test_evaluations_come_as_often_as_asked_and_change_nothing(tmp_path: Path) -> None:
    run, plain = Run(tmp_path, train={"eval_every": 2}), Run(tmp_path)
    run.train()
    evaluated = run.metrics
    assert [line["step"] for line in evaluated if "valid_loss" in line] == [2, 4, 5]
    plain.train()
    assert torch.equal(run.weights(), plain.weights())
    assert [line["loss"] for line in evaluated] == [line["loss"] for line in plain.metrics]


def test_where_a_run_only_pauses_is_no_evaluation(tmp_path: Path) -> None:
    run = Run(tmp_path, train={"eval_every": 9, "stop_after": 3})
    run.train()
    assert not any("valid_loss" in line for line in run.metrics)
    run.trainer.config = with_train(run.trainer.config, stop_after=None)
    run.train(start_step=3)
    assert [line["step"] for line in run.metrics if "valid_loss" in line] == [5]


def validating(run: Run, *losses: float) -> None:
    """Have the run's evaluations come to these numbers, and to so many more."""
    numbers = iter(losses)
    run.learner.evaluate = lambda batches: Evaluation({"loss": next(numbers)}, 1, "token")  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("losses", "best", "saved"),
    [
        ((3.0, 2.0, 2.5, 2.0, 9.0), Best("valid_loss"), [1, 2, 5]),
        ((3.0, 2.0, 2.5, 2.0, 9.0), Best("valid_loss", patience=2), [1, 2, 4]),
        ((3.0, 2.0, 2.5, 4.0, 9.0), Best("valid_loss", greater_is_better=True), [1, 4, 5]),
        ((float("nan"), 2.0, float("inf"), 1.0, 1.5), Best("valid_loss"), [2, 4, 5]),
        ((float("nan"), float("nan"), 1.0, 1.0, 1.0), Best("valid_loss", patience=2), [2]),
    ],
)
def test_the_best_is_saved_and_none_better_ends_the_run(
    tmp_path: Path, losses: tuple[float, ...], best: Best, saved: list[int]
) -> None:
    run = Run(tmp_path, train={"eval_every": 1})
    validating(run, *losses)
    run.train(best=best)
    assert run.saved_steps == saved
    assert [line["step"] for line in run.metrics] == list(range(1, saved[-1] + 1))


def test_a_run_in_two_parts_knows_the_best_of_both(tmp_path: Path) -> None:
    run = Run(tmp_path, train={"eval_every": 1, "stop_after": 3})
    first = Best("valid_loss", patience=3)
    validating(run, 3.0, 2.0, 2.5)
    run.train(best=first)
    second = Best("valid_loss", patience=3)
    second.restore(json.loads(json.dumps(first.state)))
    assert second == first
    run.trainer.config = with_train(run.trainer.config, stop_after=None)
    validating(run, 2.1, 2.2)
    run.train(start_step=3, best=second)
    assert run.saved_steps == [1, 2, 3, 5] and second.step == 2 and second.has_waited_enough
    other = Best("valid_token_accuracy", greater_is_better=True)
    other.restore(second.state)
    assert other.value is None, "of another metric"


def test_an_evaluation_is_the_mean_over_all_targets(tmp_path: Path) -> None:
    run = Run(tmp_path)
    every_batch = [batch for batches in Data().evaluation(run.trainer.mesh) for batch in batches]
    sums = [run.trainer.evaluate([batch]) for batch in every_batch]
    result = run.trainer.evaluate_all(Data().evaluation(run.trainer.mesh))
    assert result.num_terms == sum(batch.num_targets for batch in every_batch)
    assert result.loss == pytest.approx(sum(tally.sums[0] for tally in sums) / result.num_terms, rel=1e-6)


def test_perplexity_is_e_to_the_loss_and_finite() -> None:
    objective = NextToken(vocab_size=3)
    assert objective.report({"loss": 2.0})["perplexity"] == pytest.approx(7.389056)
    assert objective.report({"loss": 1e6})["perplexity"] < float("inf")


@pytest.mark.parametrize("poison", ["loss", "gradient"])
@pytest.mark.parametrize("every", [None, 2])
def test_numbers_that_are_not_finite_abort_with_the_state_before_saved(
    tmp_path: Path, poison: str, every: int | None
) -> None:
    run = Run(tmp_path, checkpoint={"every": every})
    before: list[Tensor] = []

    def interfere() -> None:
        before.append(run.weights())
        if poison == "loss":
            run.trainer.loss_factor = float("nan")
        else:
            run.trainer.flat.gradients[0][7] = float("inf")

    run.trainer.during[3] = interfere
    with pytest.raises(TrainingAborted, match=r"step 3: .* not finite, step not taken") as aborted:
        run.train()
    assert torch.equal(run.weights(), before[0]), "the step was not taken"
    # Once, either when it was due or now.
    assert run.saved_steps == [2]
    assert torch.equal(run.saved[0][1], before[0])
    assert ("the state after step 2 is in" in str(aborted.value)) == (every is None)
    assert "optim.lr" in str(aborted.value)
    assert [line["step"] for line in run.metrics] == [1, 2]


def test_a_first_step_that_is_not_finite_saves_nothing(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.trainer.during[1] = lambda: setattr(run.trainer, "loss_factor", float("inf"))
    with pytest.raises(TrainingAborted, match="step 1: loss inf"):
        run.train()
    assert run.saved == []


@pytest.mark.usefixtures("signals_heeded")
@pytest.mark.parametrize("repeated", [False, True])
def test_a_signal_ends_the_run_after_its_step_with_all_saved(tmp_path: Path, repeated: bool) -> None:
    run = Run(tmp_path)

    def interrupt() -> None:
        signal.raise_signal(signal.SIGINT)
        if repeated:
            signal.raise_signal(signal.SIGTERM)

    run.trainer.during[2] = interrupt
    with pytest.raises(Interrupted, match=r"stopped by SIGINT after step 2 of 5; saved .*step-2") as stopped:
        run.train()
    assert "goes on" in str(stopped.value)
    assert run.saved_steps == [2]
    assert torch.equal(run.saved[0][1], run.weights())
    assert [line["step"] for line in run.metrics] == [1, 2]


@pytest.mark.usefixtures("signals_heeded")
def test_a_signal_in_the_last_step_is_not_an_interruption(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.trainer.during[5] = lambda: signal.raise_signal(signal.SIGTERM)
    run.train()
    assert run.saved_steps == [5]


def test_what_goes_to_a_gpu_is_pinned_where_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGpu(NamedTuple):
        device: torch.device
        data_rank: int = 0

    pinned: list[Tensor] = []

    def pin_memory(tensor: Tensor) -> Tensor:
        pinned.append(tensor.clone())
        return pinned[-1]

    monkeypatch.setattr(Tensor, "pin_memory", pin_memory)
    plain, (batch, *_) = (read_microbatches(Data(), OnGpu(torch.device(kind)), 1) for kind in ("cpu", "cuda"))
    for name, value in vars(plain[0]).items():
        there = getattr(batch, name)
        if isinstance(value, Tensor):
            assert torch.equal(there, value) and any(there is each for each in pinned)
        else:
            assert there == value
    prompt = TokenizedPrompt(3, np.arange(4, dtype=np.int32), "shown", {}, "file line 1")
    assert in_pinned_memory(prompt) == prompt


def test_data_that_cannot_be_read_ends_the_run_with_what_is_done_saved(tmp_path: Path) -> None:
    class Broken(Data):
        def microbatches(self, step: int, mesh: Mesh) -> list[Microbatch]:
            if step == 3:
                raise InputError("token 600 in corpus.bin")
            return super().microbatches(step, mesh)

    run = Run(tmp_path)
    saved: list[int] = []

    def save(step: int) -> Path:
        saved.append(step)
        return tmp_path

    with (
        Report(tmp_path, 0, 5, speaks=True, tensorboard=False) as report,
        pytest.raises(InputError, match="token 600"),
    ):
        train(run.learner, Broken(), report, 0, save)
    assert saved == [2]
