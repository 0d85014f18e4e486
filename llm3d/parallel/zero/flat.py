"""All parameters of a rank in flat units, and what a training step does with their gradients."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from llm3d.config import ZeroConfig
from llm3d.kernels.gradient_norm import squared_norm
from llm3d.parallel.boxes import Piece, ShardedParameter
from llm3d.parallel.collectives import AllReduceInFlight, SumInFlight, all_reduce_sum, is_alone
from llm3d.parallel.mesh import Mesh
from llm3d.parallel.zero.unit import FlatUnit


class Stage(Protocol):
    """What a pipeline stage says of itself; `llm3d.models.llama.LlamaStage` is one."""

    def units(self) -> Sequence[nn.Module]:
        """The modules whose parameters are stored and gathered together, in the order in which forward calls them."""

    def modules(self) -> Iterator[nn.Module]:
        """All modules, as of any nn.Module."""


@dataclass(frozen=True)
class _Stop:
    """A call of a module on the way through a stage, and the units that hold its parameters."""

    units: tuple[FlatUnit, ...]
    in_backward: bool  # whether backward reads the weights


class _Sum(NamedTuple):
    """Of a unit's gradients over the data group. nbytes: what it takes beside what is kept from step to step."""

    unit: FlatUnit
    flying: SumInFlight | AllReduceInFlight
    add: bool
    nbytes: int


class FlatParameters:
    """Gives storage to the parameters of a rank's stages, in model order, and shards them as ZeRO does.

    units: in the order in which forward uses them.
    frozen: more units, of parameters that need no gradient; with trainable=False, all are in `units`.
    parameters: this rank's shard of each unit, the compute dtype.
    gradients: this rank's shard of each unit, `gradient_dtype`; absent with trainable=False.
    Without data parallelism, and in stage 0, a shard is the whole unit.

    Gradients are sent in `reduce_dtype`. Sums over the data group that are taken where gradients are kept anyway all
    run beside the backward pass. Others take memory: no more of it at a time than one unit's gradients, or one sum.

    What a rank sends a step over the data group of n, of P bytes of parameters or gradients and M microbatches, each
    times (n - 1) / n: stage 0: 2 P. Stage 1: P of gradients, P of parameters. Stage 2: M P of gradients, P of
    parameters. Stage 3: M P of gradients, and up to 2 M P of parameters: what ends a stage's forward stays for its
    backward, and an embedding's backward needs no weights.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        mesh: Mesh,
        dtype: torch.dtype,
        zero: ZeroConfig | None = None,
        trainable: bool = True,
        gradient_dtype: torch.dtype = torch.float32,
        reduce_dtype: torch.dtype | None = None,
    ) -> None:
        """reduce_dtype: None, as gradient_dtype."""
        zero = zero or ZeroConfig()
        sharded = not is_alone(mesh.data) and (trainable or zero.stage == 3)
        self.mesh, self.dtype, self.prefetch = mesh, dtype, zero.prefetch
        self.stage = zero.stage if sharded else 0
        self.units: list[FlatUnit] = []
        self.frozen: list[FlatUnit] = []
        self._home: dict[nn.Parameter, FlatUnit] = {}
        self._paths = [[self._stop(module, trainable) for module in stage.units()] for stage in stages]
        for stage, path in zip(stages, self._paths, strict=True):
            self._give_storage(stage)
            if self.stage:
                for i, module in enumerate(stage.units()):
                    _watch(module, _Passage(self, path, i))
        if trainable:
            self._prepare_gradients(gradient_dtype)
            self.reduce_dtype = reduce_dtype or gradient_dtype
        self._sums: deque[_Sum] = deque()

    def _stop(self, module: nn.Module, trainable: bool) -> _Stop:
        """Make units of the module's parameters that no module before it has: the frozen ones apart."""
        trained: list[ShardedParameter] = []
        frozen: list[ShardedParameter] = []
        for parameter in module.parameters():
            assert isinstance(parameter, ShardedParameter), "models are built of parallel layers"
            if parameter not in self._home:
                (trained if parameter.requires_grad or not trainable else frozen).append(parameter)
        for new, made in ((trained, self.units), (frozen, self.frozen)):
            if new:
                made.append(self._unit(new))
                self._home |= dict.fromkeys(new, made[-1])
        units = dict.fromkeys(self._home[parameter] for parameter in module.parameters())
        return _Stop(tuple(units), getattr(module, "backward_reads_weights", True))

    def _unit(self, parameters: Sequence[ShardedParameter]) -> FlatUnit:
        num_shards, rank = (self.mesh.data_size, self.mesh.data_rank) if self.stage else (1, 0)
        return FlatUnit(parameters, num_shards, rank, self.dtype, self.mesh.device, frees=self.stage == 3)

    def _give_storage(self, stage: Stage) -> None:
        """Put the parameters with storage, wherever modules hold them, in the place of those without."""
        for module in stage.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                assert parameter in self._home, f"{name} is a parameter of no unit"
                setattr(module, name, self._home[parameter].placed[parameter][0])
            for name, buffer in list(module.named_buffers(recurse=False)):
                setattr(module, name, buffer.to(self.mesh.device))

    # ---- a step's gradients ----

    def _prepare_gradients(self, dtype: torch.dtype) -> None:
        self.gradient_dtype = dtype
        for unit in self.units:
            unit.keep_gradients(dtype, whole=self.stage < 2)
            for parameter, _ in unit.placed.values():
                parameter.on_accumulated = partial(self._accumulated, unit)
        self._owned = [_owned_ranges(unit) for unit in self.units]
        self._outstanding = dict.fromkeys(self.units, 0)

    @property
    def gradients(self) -> list[Tensor]:
        return [unit.gradients for unit in self.units]

    @property
    def parameters(self) -> list[Tensor]:
        return [unit.parameters for unit in self.units]

    def begin_step(self, num_microbatches: int) -> None:
        """Forget the gradients and expect backward passes of `num_microbatches` microbatches."""
        self._num_microbatches = num_microbatches
        for unit in self.units:
            self._outstanding[unit] = unit.uses * num_microbatches
            unit.forget_gradients()

    def _accumulated(self, unit: FlatUnit) -> None:
        """With the last addition to a unit (stages 2 and 3: of a microbatch), start the sum over the data group."""
        self._outstanding[unit] -= 1
        left = self._outstanding[unit]
        assert left >= 0, "more backward passes than begin_step announced"
        if self.stage >= 2 and left % unit.uses == 0:
            first = left == unit.uses * (self._num_microbatches - 1)
            self._start_sum(unit, unit.detach(), add=not first)
        elif self.stage < 2 and left == 0 and not is_alone(self.mesh.data):
            assert unit.whole_gradients is not None
            self._start_sum(unit, unit.whole_gradients, add=False)

    def _start_sum(self, unit: FlatUnit, gradients: Tensor, add: bool) -> None:
        while self._sums and self._are_enough(self._sums[-1]):
            self._finish_sum()
        flying: SumInFlight | AllReduceInFlight
        if self.stage:
            flying = SumInFlight(gradients, self.mesh.data, self.reduce_dtype, in_place=True)
        else:
            flying = AllReduceInFlight(gradients, self.mesh.data, self.reduce_dtype)
        passing = gradients.nbytes if self.stage >= 2 and flying.sent is gradients else 0
        self._sums.append(_Sum(unit, flying, add, passing + flying.nbytes))

    def _are_enough(self, last: _Sum) -> bool:
        """Whether one more sum like the last one would make it more memory than one unit's gradients take."""
        return (len(self._sums) + 1) * last.nbytes > last.unit.size * self.gradient_dtype.itemsize

    def _finish_sum(self) -> None:
        done = self._sums.popleft()
        done.flying.finish(done.unit.gradients, done.add)

    def finish_gradients(self) -> None:
        """Wait for the sums over the data group; then sum what is partial over other groups."""
        for unit in self.units:
            assert self._outstanding[unit] == 0, "fewer backward passes than begin_step announced"
        while self._sums:
            self._finish_sum()
        for group, views in self._partial_gradients().items():
            message = torch.cat([view.reshape(-1) for view in views])
            dist.all_reduce(message, group=group)
            for view, total in zip(views, message.split([view.numel() for view in views]), strict=True):
                view.copy_(total.view_as(view))

    def _partial_gradients(self) -> dict[ProcessGroup, list[Tensor]]:
        """By group. Its ranks hold the same units, with the same shards, of what is partial over it."""
        views: dict[ProcessGroup, list[Tensor]] = {}
        for piece, view in self.pieces(self.gradients):
            if piece.partial is not None:
                views.setdefault(piece.partial, []).append(view)
        return views

    def traffic(self) -> tuple[int, int]:
        """Bytes that this rank sends over the data group: for each microbatch, at most, and once a step."""
        share = (self.mesh.data_size - 1) / self.mesh.data_size
        gradients = sum(unit.size for unit in self.units) * self.reduce_dtype.itemsize
        parameters = sum(unit.size for unit in self.units) * self.dtype.itemsize
        gathered = sum(
            unit.size * (1 + (stop.in_backward and stop is not path[-1]))
            for path in self._paths
            for stop in path
            for unit in stop.units
        )
        each, once = {
            0: (0, 2 * gradients),
            1: (0, gradients + parameters),
            2: (gradients, parameters),
            3: (gradients + gathered * self.dtype.itemsize, 0),
        }[self.stage]
        return round(each * share), round(once * share)

    @property
    def kept_gradients(self) -> list[Tensor]:
        """What gradients are kept in from step to step; between steps what is there is of no use."""
        kept = [
            unit.gradients if unit.whole_gradients is None else unit.whole_gradients for unit in self.units
        ]
        return [gradients for gradients in kept if len(gradients)]

    def bytes_of_passing_gradients(self) -> int:
        """Of whole gradients that are there for a while, and of those on their way to other ranks."""
        passing = [unit.whole_gradients for unit in self.units if self.stage >= 2]
        whole = sum(gradients.nbytes for gradients in passing if gradients is not None)
        return whole + sum(done.nbytes for done in self._sums)

    def gradient_norm(self) -> Tensor:
        """fp64 scalar: the L2 norm of the whole model's gradient, each element counted once, the same on all ranks."""
        squares = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        if self.num_replicas == 1 or self.mesh.data_rank == 0:  # of copies one is counted
            for unit, ranges in zip(self.units, self._owned, strict=True):
                for part in ranges:
                    squares += squared_norm(unit.gradients[part])[0]
        return all_reduce_sum(squares, self.mesh.everyone).sqrt()

    # ---- parameters ----

    def publish(self, unit: FlatUnit) -> None:
        """Let other data ranks have what was written into this rank's shard; the unit's next use waits for theirs."""
        if self.stage in (1, 2):
            unit.gather(self.mesh.data)

    def settle(self) -> None:
        """Wait for what is on its way from other ranks."""
        for unit in (*self.units, *self.frozen):
            unit.wait()

    def pieces(self, shards: Sequence[Tensor]) -> Iterator[tuple[Piece, Tensor]]:
        """What this rank's shards of the units, tensors laid out like `parameters`, hold."""
        for unit, shard in zip(self.units, shards, strict=True):
            yield from unit.pieces(shard)

    def weights(self, trained: Sequence[Tensor]) -> Iterator[tuple[Piece, Tensor]]:
        """What new weights are written into, frozen ones included.

        trained: of the units, tensors laid out like `parameters`. Nothing is on its way meanwhile: a gather that
        ended later would put this rank's share back as it was when it started.
        """
        self.settle()
        yield from self.pieces(trained)
        for unit in self.frozen:
            yield from unit.pieces(unit.parameters)

    def held(self) -> Iterator[tuple[Piece, Tensor]]:
        """All weights whose values this rank knows, in the compute dtype; no rank changes them meanwhile."""
        self.settle()
        for unit in (*self.units, *self.frozen):
            if unit.frees:
                yield from unit.pieces(unit.parameters)
            else:
                for parameter, _ in unit.placed.values():
                    yield from ((piece, piece.view(parameter.data)) for piece in parameter.pieces)

    @property
    def replica(self) -> ProcessGroup:
        """The ranks whose shards together are one copy of this pipeline stage."""
        return self.mesh.stage if self.stage else self.mesh.tensor

    @property
    def num_replicas(self) -> int:
        """How many copies of this pipeline stage there are."""
        return 1 if self.stage else self.mesh.data_size


class _Passage:
    """What is done with parameters and gradients as microbatches pass one stop of a stage, forward and backward."""

    def __init__(self, flat: FlatParameters, path: Sequence[_Stop], index: int) -> None:
        self.flat, self.path, self.index, self.stop = flat, path, index, path[index]

    def enter_forward(self) -> None:
        following = self.path[self.index + 1 : self.index + 1 + self.flat.prefetch]
        self._have(self.stop, following)

    def leave_forward(self, training: bool) -> None:
        """Backward begins with the last stop: what that gathered may stay."""
        if not (training and self.index + 1 == len(self.path)):
            self._release()

    def enter_backward(self) -> None:
        previous = self.path[max(0, self.index - self.flat.prefetch) : self.index]
        if self.stop.in_backward:
            self._have(self.stop, [stop for stop in reversed(previous) if stop.in_backward])
        for unit in self.stop.units:
            if self.flat.stage >= 2 and unit.trained and unit.whole_gradients is None:
                unit.attach(torch.empty(unit.size, dtype=self.flat.gradient_dtype, device=unit.whole.device))

    def leave_backward(self) -> None:
        self._release()

    def _have(self, stop: _Stop, soon: Sequence[_Stop]) -> None:
        """The stop's units gathered; those of the stops that are passed soon on their way."""
        if self.flat.stage == 3:
            for unit in (unit for each in (stop, *soon) for unit in each.units):
                if not unit.gathered:
                    unit.gather(self.flat.mesh.data)
        for unit in stop.units:
            unit.wait()

    def _release(self) -> None:
        if self.flat.stage == 3:
            for unit in self.stop.units:
                unit.release()


def _watch(module: nn.Module, passage: _Passage) -> None:
    """Have the passage follow the module's calls, and their way back through autograd.

    Of several results the first is the one that the module computes last: its way back begins there.
    """

    def before(_: nn.Module, args: tuple[Any, ...]) -> None:
        passage.enter_forward()
        if torch.is_grad_enabled() and isinstance(args[0], Tensor) and args[0].requires_grad:
            args[0].register_hook(lambda _: passage.leave_backward())

    def after(_: nn.Module, args: tuple[Any, ...], output: Tensor | tuple[Tensor, ...]) -> None:
        passage.leave_forward(torch.is_grad_enabled())
        last = output if isinstance(output, Tensor) else output[0]
        if last.requires_grad:
            last.register_hook(lambda _: passage.enter_backward())

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after)


def _owned_ranges(unit: FlatUnit) -> list[slice]:
    """The parts of a unit's shard that this rank owns, as long as they can be."""
    ranges: list[slice] = []
    for piece, view in unit.pieces(torch.empty(unit.shard_size, device="meta")):
        start = int(view.storage_offset())
        if piece.owned and ranges and ranges[-1].stop == start:
            ranges[-1] = slice(ranges[-1].start, start + view.numel())
        elif piece.owned:
            ranges.append(slice(start, start + view.numel()))
    return ranges
