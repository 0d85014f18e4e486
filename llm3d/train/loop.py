"""The training loop: batches in, metrics, evaluations and checkpoints out, until the last step or a signal."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, Protocol

from torch import Tensor

from llm3d.config import Config
from llm3d.data.steps import Consumed, Steps
from llm3d.errors import InputError, Interrupted, TrainingAborted
from llm3d.models.batch import Batch
from llm3d.parallel.agreement import input_errors_on_all
from llm3d.parallel.mesh import Mesh
from llm3d.train.best import Best
from llm3d.train.learner import Learner
from llm3d.train.learning_rate import learning_rate
from llm3d.train.report import Report, memory_gib, rounded
from llm3d.train.signals import StopSignals
from llm3d.train.throughput import peak_flops
from llm3d.train.trainer import Notice, StepResult


class EvaluationData(Protocol):
    """What evaluation asks of a stage's data, on each data rank."""

    def evaluation(self, mesh: Mesh) -> Iterable[Sequence[Batch]]:
        """Lists of microbatches that together are this rank's share of the validation data."""


class TrainingData(EvaluationData, Protocol):
    """What the loop asks of a stage's data, on each data rank."""

    @property
    def steps(self) -> Steps:
        """Which samples each step takes, and which step is the last."""

    def consumed(self, step: int) -> Consumed:
        """What has been read when a step is done, by all ranks, since the first step."""

    def microbatches(self, step: int, mesh: Mesh) -> Sequence[Batch]:
        """This rank's microbatches of step 1, 2, ...; a pure function of the step."""


def train(
    learner: Learner,
    data: TrainingData,
    report: Report,
    start_step: int,
    save: Callable[[int], Path],
    best: Best | None = None,
) -> None:
    """Train from start_step + 1 to the run's last step, to train.stop_after, or until `best` has waited enough.

    save(step): writes a checkpoint on all ranks; called as often as the settings say, after the last step, after an
    evaluation that is the best so far, when a signal asks to stop (then Interrupted is raised) and, where that loses
    steps, before TrainingAborted or InputError, which reading or a step that has changed no weight may do, is raised.
    best: told of each evaluation.
    """
    config, mesh, steps = learner.model.config, learner.model.mesh, data.steps.last
    last_step = min(steps, config.train.stop_after or steps)
    meter, best, last_saved = _Meter(learner), best or Best(), start_step
    with StopSignals(report.say) as signals, ThreadPoolExecutor(1) as reader:
        read = partial(reader.submit, partial(read_microbatches, data, mesh))
        upcoming, notice = read(start_step + 1), Notice(unread=1)  # for all that is known
        for step in range(start_step + 1, last_step + 1):
            started = time.perf_counter()
            rescue = partial(save, step - 1) if last_saved < step - 1 else None
            microbatches = _agreed(upcoming, mesh, rescue) if notice.unread else upcoming.result()
            if step < last_step:
                upcoming = read(step + 1)
            lr = learning_rate(*data.steps.schedule(step), config.optim)
            with _saving_first(rescue):
                result = learner.step(microbatches, lr, partial(_notice, upcoming, signals))
            if result.problem:
                _abort(step, result.problem, None if result.changed else rescue)
            if result.skipped:
                report.say(f"step {step}: skipped, overflow at a loss scale of {result.loss_scale:g}")
            metrics = _progress(data, step)
            tokens = metrics["tokens"] - data.consumed(step - 1).tokens
            metrics |= meter.measure(microbatches, tokens, result, lr, time.perf_counter() - started)
            evaluates = _evaluates(config, data.steps, step)
            if evaluates:
                metrics |= _evaluation(learner, data, report, step)
            is_best = evaluates and best.see(step, metrics)
            is_last = step == last_step or best.has_waited_enough
            report.step(metrics, is_last or evaluates or step % config.log.every == 0, result.examples)
            notice = result.notice
            stop = notice.signal
            if stop or is_last or is_best or config.checkpoint.saves.ends_at(step, data.steps.epoch):
                path, last_saved = save(step), step
                if stop and not is_last:
                    _interrupt(stop, step, last_step, path)
            if is_last:
                break


def _progress(data: TrainingData, step: int) -> dict[str, Any]:
    """How far the run has come."""
    epoch = data.steps.epoch(step)
    return {
        "step": step,
        **({} if epoch is None else {"epoch": round(epoch, 6)}),
        **data.consumed(step)._asdict(),
    }


def _evaluates(config: Config, steps: Steps, step: int) -> bool:
    """As often as the settings say, and at the end; where a run only pauses is no end."""
    interval = config.train.evaluations
    return interval.is_given and (step == steps.last or interval.ends_at(step, steps.epoch))


def _evaluation(learner: Learner, data: TrainingData, report: Report, step: int) -> dict[str, float]:
    """Say what comes of the validation data; -> the numbers, by the names that metrics have."""
    numbers = learner.evaluate(data.evaluation(learner.model.mesh)).numbers
    summary = ", ".join(f"{name} {rounded(value)}" for name, value in numbers.items())
    report.say(f"step {step}: validation {summary}")
    for example in learner.examples():
        report.say(f"step {step}: {example}")
    return {f"valid_{name}": value for name, value in numbers.items()}


def read_microbatches(data: TrainingData, mesh: Mesh, step: int) -> Sequence[Batch]:
    """Of this rank. What goes to a GPU is in pinned memory, from which it is copied while the host goes on."""
    microbatches = data.microbatches(step, mesh)
    return [in_pinned_memory(batch) for batch in microbatches] if mesh.device.type == "cuda" else microbatches


def in_pinned_memory(batch: Any) -> Any:
    """The microbatch, a dataclass, with copies of its tensors."""
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return replace(batch, **{name: x.pin_memory() for name, x in values.items() if isinstance(x, Tensor)})


def _notice(upcoming: Future[Sequence[Batch]], signals: StopSignals) -> Notice:
    """What the other ranks are to know when a step has been launched, beside which the next one's data was read."""
    return Notice(unread=int(upcoming.exception() is not None), signal=signals.received or 0)


def _agreed(
    upcoming: Future[Sequence[Batch]], mesh: Mesh, rescue: Callable[[], Path] | None
) -> Sequence[Batch]:
    """The step's microbatches. Where a rank cannot read its own, all save what is done and raise InputError.

    Between hosts, which wait for each other: before the first step, and when a rank has said that it cannot.
    """
    with _saving_first(rescue), input_errors_on_all(mesh.everyone):
        return upcoming.result()


@contextmanager
def _saving_first(rescue: Callable[[], Path] | None) -> Iterator[None]:
    """Before an InputError of the block, the same on every rank, goes on."""
    try:
        yield
    except InputError:
        if rescue:
            rescue()
        raise


class _Meter:
    """Turns a step's result into the numbers that metrics.jsonl holds."""

    def __init__(self, learner: Learner) -> None:
        self.learner = learner
        _, self.peak = peak_flops(learner.model.mesh.device, learner.model.config.precision.compute)

    def measure(
        self, microbatches: Sequence[Batch], tokens: int, result: StepResult, lr: float, seconds: float
    ) -> dict[str, Any]:
        """tokens: of the step, over all ranks."""
        mesh, flops = self.learner.model.mesh, self.learner.flops(microbatches, tokens)
        per_device = None if flops is None else flops / seconds / mesh.size
        return {
            "loss": result.loss,
            **result.metrics,
            "lr": lr,
            "grad_norm": None if result.skipped else result.grad_norm,
            **({} if result.loss_scale is None else {"loss_scale": result.loss_scale}),
            "step_time_s": seconds,
            "tokens_per_s": tokens / seconds,
            "tflops_per_device": None if per_device is None else per_device / 1e12,
            "mfu": per_device / self.peak if self.peak and per_device is not None else None,
            "memory_gib": result.metrics.get("memory_gib", memory_gib(mesh.device.type)),
        }


def _abort(step: int, problem: str, rescue: Callable[[], Path] | None) -> None:
    """Save the weights, which the step has not touched, and raise."""
    saved = f"; the state after step {step - 1} is in {rescue()}" if rescue else ""
    raise TrainingAborted(
        f"step {step}: {problem}{saved}; "
        "lower optim.lr, lengthen optim.warmup_steps or look at this step's data"
    )


def _interrupt(number: int, step: int, last_step: int, path: Path) -> NoReturn:
    name = signal.Signals(number).name
    raise Interrupted(
        f"stopped by {name} after step {step} of {last_step}; saved {path}; the same command goes on from there"
    )
