"""A model under one layout: evaluated, or with its optimizer trained a step at a time."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llm3d.config import Config
from llm3d.errors import InputError
from llm3d.kernels import backend
from llm3d.kernels.settings import use_settings
from llm3d.models import heads
from llm3d.models.batch import Batch
from llm3d.models.build import DTYPES, build_stages, initialize
from llm3d.parallel.agreement import input_errors_on_all
from llm3d.parallel.boxes import Piece
from llm3d.parallel.collectives import all_reduce_max, all_reduce_sum
from llm3d.parallel.mesh import Mesh
from llm3d.parallel.pipeline import Pipeline
from llm3d.parallel.products import choose_products
from llm3d.parallel.schedules import Schedule
from llm3d.parallel.zero.flat import FlatParameters
from llm3d.train.host_memory import available_memory
from llm3d.train.loss_scale import LossScale
from llm3d.train.meaning import meaning_of
from llm3d.train.objective import NextToken, Objective, Tally
from llm3d.train.optimizer import Optimizer
from llm3d.train.throughput import step_flops


class Notice(NamedTuple):
    """What a rank tells the others beside a step's numbers: 0 for nothing. Of several, the larger numbers count."""

    unread: int = 0  # 1: it cannot read the next step's data
    signal: int = 0  # that asks for an end


class StepResult(NamedTuple):
    loss: float  # mean over all that the objective counts, of all ranks
    grad_norm: float  # before clipping
    metrics: dict[str, float]  # what the objective reports beside the loss
    loss_scale: float | None = None  # that the step was taken with, in fp16
    skipped: bool = False  # the gradients overflowed fp16: nothing was changed but the loss scale
    problem: str | None = None  # why training cannot go on
    changed: bool = False  # weights were, before the problem
    examples: Sequence[dict[str, Any]] = ()  # of what the model wrote in the step, for people
    notice: Notice = Notice()  # of all ranks


class ShardedModel:
    """A model under one layout, for forward passes. Every rank of the mesh holds one and calls it at the same time."""

    def __init__(
        self, config: Config, mesh: Mesh, objective: Objective | None = None, trainable: bool = False
    ) -> None:
        """objective: None, with pretraining's settings, is theirs."""
        self.config, self.mesh = config, mesh
        self.objective = objective or next_token(config)
        self.dtype = DTYPES[config.precision.compute]
        use_settings(config, mesh.device)
        self.stages = build_stages(
            config.model, config.parallel, mesh, config.recompute, self.objective.head, config.lora
        )
        self._check_host_memory(trainable)
        self._choose_products()
        gradients = DTYPES[config.precision.gradients]
        reduce = DTYPES[config.precision.reduce_dtype or config.precision.gradients]
        self.flat = FlatParameters(self.stages, mesh, self.dtype, config.zero, trainable, gradients, reduce)
        schedule, hidden_size = Schedule.of(config.parallel), config.model.hidden_size
        token_multiple = config.parallel.token_multiple
        self.pipeline = Pipeline(mesh, self.stages, schedule, hidden_size, self.dtype, token_multiple)

    def _check_host_memory(self, trainable: bool) -> None:
        """Raise InputError on all ranks where a host has too little for what its ranks will keep there."""
        config, mesh = self.config, self.mesh
        parameters = {p for stage in self.stages for p in stage.parameters()}
        num_trained = sum(p.numel() for p in parameters if p.requires_grad) if trainable else 0
        num_frozen = sum(p.numel() for p in parameters) - num_trained
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        needed = ranks * host_bytes(config, mesh, num_trained, num_frozen)
        available = available_memory() if needed else None
        with input_errors_on_all(mesh.everyone):
            if available is not None and needed > available:
                raise InputError(
                    f"the ranks of this host keep {needed / 2**30:.1f} GiB in its memory, of which "
                    f"{available / 2**30:.1f} GiB are left; use more ranks with a higher zero.stage, a lower "
                    "zero.offload_fraction or a smaller model"
                )

    def _choose_products(self) -> None:
        """The libraries that compute matrix products, where there is a choice."""
        if self.mesh.device.type == "cpu" and self.dtype == torch.float32 and not backend.is_plain_torch():
            choose_products((p for stage in self.stages for p in stage.parameters()), self.mesh.everyone)

    def weights(self) -> Iterator[tuple[Piece, Tensor]]:
        """What to write first weights into; then call `publish`."""
        return self.flat.weights(self.flat.parameters)

    def publish(self) -> None:
        """Take over what was written into `weights`."""
        for unit in self.flat.frozen:
            self.flat.all_gather_parameters(unit)

    def initialize(self) -> None:
        """Random first weights, from run.seed."""
        initialize(self.weights(), self.config.model, self.config.run.seed)
        self.publish()

    @torch.no_grad()
    def evaluate(self, microbatches: Sequence[Batch]) -> Tally:
        """The objective's numbers over all ranks' microbatches, on every rank."""
        microbatches = self.on_device(microbatches)
        outputs = self.outputs(microbatches, self.objective)
        return self._tally(torch.cat([self._count(microbatches), self._numbers(outputs)]).tolist())

    def evaluate_all(self, batches: Iterable[Sequence[Batch]]) -> Tally:
        """The same over several lists of microbatches, as many on every rank."""
        return functools.reduce(Tally.with_more, map(self.evaluate, batches))

    def on_device(self, microbatches: Sequence[Batch]) -> Sequence[Batch]:
        return [batch.to(self.mesh.device) for batch in microbatches]

    @torch.no_grad()
    def outputs(self, microbatches: Sequence[Batch], objective: heads.OutputFunction) -> list[Tensor] | None:
        """What the objective makes of each of this data rank's microbatches; None but on the last pipeline stage."""
        if self.pipeline.is_cold:
            self.pipeline.warm_up(microbatches[0], objective)
        return self.pipeline.run(microbatches, objective)

    def _count(self, microbatches: Sequence[Batch]) -> Tensor:
        """Terms of the loss over all ranks' microbatches: fp64 [1] on the device."""
        count = sum(self.objective.count(batch) for batch in microbatches)
        return all_reduce_sum(numbers_on(self.mesh.device, count), self.mesh.data)

    def _numbers(self, outputs: list[Tensor] | None) -> Tensor:
        """From the last stage's numbers of each microbatch: those of all data ranks, on every rank.

        fp64 [sums + maxima] on the device; see `Objective`.
        """
        num_sums, num_maxima = 1 + len(self.objective.sums), len(self.objective.maxima)
        sums = torch.zeros(num_sums, device=self.mesh.device, dtype=torch.float64)
        maxima = sums.new_full((num_maxima,), -math.inf)
        if outputs is not None and self.mesh.tensor_rank == 0:  # all tensor ranks have the same
            stacked = torch.stack(outputs).double()  # [microbatches, numbers]
            sums += stacked[:, :num_sums].sum(0)
            if num_maxima:
                maxima = stacked[:, num_sums:].amax(0)
        all_reduce_sum(sums, self.mesh.everyone)
        if num_maxima:
            all_reduce_max(maxima, self.mesh.everyone)
        return torch.cat([sums, maxima])

    def _tally(self, count_and_numbers: Sequence[float]) -> Tally:
        """Of what `_count` and `_numbers` have found, in a row."""
        count, *numbers = count_and_numbers
        num_sums = 1 + len(self.objective.sums)
        return Tally(tuple(numbers[:num_sums]), tuple(numbers[num_sums:]), int(count))


def numbers_on(device: torch.device, *values: float) -> Tensor:
    """fp64 [values] on a device; they go there with kernels' arguments, where a host would wait for a copy."""
    return torch.stack([torch.full((), value, dtype=torch.float64, device=device) for value in values])


def next_token(config: Config) -> NextToken:
    """What pretraining and supervised fine-tuning train on."""
    assert config.model.vocab_size is not None, "the tokenizer has told it"
    return NextToken(config.model.vocab_size, config.token_loss)


def host_bytes(config: Config, mesh: Mesh, num_trained: int, num_frozen: int) -> float:
    """Bytes that a rank with so many parameters keeps in host memory: all that it keeps on a CPU, else what is
    offloaded.
    """
    zero, precision = config.zero, config.precision
    shards = mesh.replicas.size() if zero.stage else 1
    state = (4 + 2 * DTYPES[precision.moments].itemsize) / shards
    if mesh.device.type != "cpu":
        offloaded = mesh.device.type == "cuda" and zero.offload != "none"
        return num_trained * state * zero.offload_fraction if offloaded else 0.0
    parameters = DTYPES[precision.compute].itemsize / (shards if zero.stage == 3 else 1)
    if precision.compute == "fp32" and zero.offload == "none":
        state -= 4 / shards  # the parameters are their own master weights
    gradients = DTYPES[precision.gradients].itemsize / (shards if zero.stage >= 2 else 1)
    return num_trained * (parameters + gradients + state) + num_frozen * parameters


class Trainer(ShardedModel):
    """A model with its gradients and its optimizer.

    meaning: what its checkpoints mean; on the first rank.
    """

    def __init__(self, config: Config, mesh: Mesh, objective: Objective | None = None) -> None:
        super().__init__(config, mesh, objective, trainable=True)
        moments = DTYPES[config.precision.moments]
        self.optimizer = Optimizer(self.flat, config.optim, config.zero, moments, config.run.seed)
        fp16 = config.precision.compute == "fp16"
        self.loss_scale = LossScale(config.precision.loss_scale) if fp16 else None
        with input_errors_on_all(mesh.everyone):
            self.meaning = meaning_of(config) if mesh.rank == 0 else {}

    @property
    def state(self) -> dict[str, Any]:
        """What training changes beside the optimizer's state; JSON."""
        return {} if self.loss_scale is None else {"loss_scale": self.loss_scale.state}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` was."""
        if self.loss_scale is not None and "loss_scale" in state:
            self.loss_scale.restore(state["loss_scale"])

    def weights(self) -> Iterator[tuple[Piece, Tensor]]:
        """Of what is trained, the master weights."""
        return self.flat.weights(self.optimizer.master)

    def publish(self) -> None:
        super().publish()
        self.optimizer.copy_to_parameters()
        if self.optimizer.average is not None:
            self.optimizer.start_average()

    def step(
        self, microbatches: Sequence[Batch], lr: float, tell: Callable[[], Notice] | None = None
    ) -> StepResult:
        """Forward, backward and update on this data rank's microbatches of the step.

        Where the loss or the gradient is not finite, the weights stay as they are; see the result. All ranks get the
        same one. The host waits once, when all has been launched; what is offloaded it has waited for before.
        tell: asked then what the other ranks are to know; None, on all ranks alike: nothing.
        """
        microbatches = self.on_device(microbatches)
        if self.pipeline.is_cold:
            self.warm_up(microbatches[0])
        loss_scale = self.loss_scale.value if self.loss_scale else None
        scale, count = loss_scale or 1.0, self._count(microbatches)
        self.flat.begin_step(len(microbatches))
        per_term = scale / count[0].clamp(min=1.0)
        outputs = self.pipeline.run(microbatches, self.objective, per_term)
        self.flat.finish_gradients()
        norm, numbers = self.flat.gradient_norm() / scale, self._numbers(outputs)
        self.optimizer.step(lr, self._clip_factor(norm, loss=numbers[0]) / scale)
        shared = self._shared_notice(tell() if tell else None)
        unread, signal, grad_norm, *totals = torch.cat([shared, norm[None], count, numbers]).tolist()
        metrics = self._tally(totals).report(self.objective)
        notice = Notice(int(unread), int(signal))
        result = StepResult(metrics.pop("loss"), grad_norm, metrics, loss_scale, notice=notice)
        if not (math.isfinite(result.loss) and math.isfinite(grad_norm)):
            self.optimizer.forget_step()
        return self._judged(result)

    def _shared_notice(self, notice: Notice | None) -> Tensor:
        """All ranks' notice, fp64 [2] on the device."""
        numbers = numbers_on(self.mesh.device, *(notice or Notice()))
        return numbers if notice is None else all_reduce_max(numbers, self.mesh.everyone)

    def warm_up(self, microbatch: Batch) -> None:
        """Have the device load what a step runs on it, before stages send each other messages; changes nothing."""
        self.flat.begin_step(1)
        self.pipeline.warm_up(microbatch, self.objective)
        self.flat.finish_gradients()

    def flops(self, microbatches: Sequence[Batch], num_tokens: float) -> float | None:
        """Of a step with so many tokens, on all devices; attention's share is taken from this rank's microbatches."""
        data_size = self.mesh.data_size
        share = num_tokens / data_size
        return step_flops(self.config.model, microbatches, share, self.objective.head) * data_size

    def _judged(self, result: StepResult) -> StepResult:
        """The result, with what is made of numbers that are not finite."""
        if not math.isfinite(result.loss) or (
            self.loss_scale is None and not math.isfinite(result.grad_norm)
        ):
            numbers = f"loss {result.loss}, gradient norm {result.grad_norm}"
            return result._replace(problem=f"{numbers}: not finite, step not taken")
        if self.loss_scale is None:
            return result
        overflowed = not math.isfinite(result.grad_norm)
        self.loss_scale.update(overflowed)
        if overflowed and self.loss_scale.underflowed:
            return result._replace(
                problem=f"the gradients overflow fp16 even at a loss scale of {result.loss_scale:g}, "
                "where smaller ones are lost; precision.compute=bf16 needs none"
            )
        return result._replace(skipped=overflowed)

    def _clip_factor(self, norm: Tensor, loss: Tensor) -> Tensor:
        """What brings a gradient of this norm down to optim.clip_grad_norm; 1 where it is below.

        NaN, at which the optimizer changes nothing, where norm or loss is not finite. All fp64 scalars on the device.
        """
        limit = self.config.optim.clip_grad_norm
        factor = torch.ones_like(norm) if limit is None else (limit / norm).clamp(max=1.0)
        return torch.where(torch.isfinite(norm + loss), factor, math.nan)
