"""All parameters of a rank in flat units, and what a training step does with them and their gradients.

What happens to a unit as a microbatch passes the module that it is of, beside what is kept at all times:

                     parameters, in ZeRO stage 3                     gradients, in ZeRO stages 2 and 3
    pre_forward      all-gather of it and of the next; wait
    post_forward     freed, but where backward starts with it
    pre_backward     all-gather of it and of the one before; wait    memory for the whole unit's
    last addition                                                    reduce-scatter starts; the memory goes with its end
    post_backward    freed

In ZeRO stage 1, where whole gradients stay, the reduce-scatter starts with the last addition of the step, in ZeRO
stage 0 an all-reduce. In ZeRO stages 1 and 2 the optimizer starts an all-gather as it has stepped a unit's shard, and
pre_forward waits for it.
"""

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


class PipelineStage(Protocol):
    """What a pipeline stage says of itself; `llm3d.models.decoder.DecoderStage` is one."""

    def units(self) -> Sequence[nn.Module]:
        """The modules whose parameters are stored and gathered together, in the order in which forward calls them."""

    def modules(self) -> Iterator[nn.Module]:
        """All modules, as of any nn.Module."""


class _Whole(NamedTuple):
    """What a rank keeps whole at all times, of its replicas' common state; of the rest it has its shard."""

    parameters: bool
    gradients: bool
    optimizer: bool


_KEPT_WHOLE = {  # by ZeRO stage
    0: _Whole(parameters=True, gradients=True, optimizer=True),
    1: _Whole(parameters=True, gradients=True, optimizer=False),
    2: _Whole(parameters=True, gradients=False, optimizer=False),
    3: _Whole(parameters=False, gradients=False, optimizer=False),
}


@dataclass(frozen=True)
class _ModuleCall:
    """A call of a module on the way through a pipeline stage, and the units that hold its parameters."""

    units: tuple[FlatUnit, ...]
    backward_reads_weights: bool


class _Sum(NamedTuple):
    """Of a unit's gradients over its group. nbytes: what it takes beside what is kept from step to step."""

    unit: FlatUnit
    flying: SumInFlight | AllReduceInFlight
    add: bool
    nbytes: int


class FlatParameters:
    """Gives storage to the parameters of a rank's pipeline stages, in model order, and shards them as ZeRO does.

    units: in the order in which forward uses them.
    frozen: more units, of parameters that need no gradient; with trainable=False, all are in `units`.
    parameters: this rank's shard of each unit, the compute dtype.
    gradients: this rank's shard of each unit, `gradient_dtype`; absent with trainable=False.
    zero_stage: 0 where there are no replicas, or nothing to shard. Then a shard is the whole unit.

    Gradients are sent in `reduce_dtype`. Sums over a unit's group that are taken where gradients are kept anyway all
    run beside the backward pass. Others take memory: no more of it at a time than one unit's gradients, or one sum.

    What a rank sends a step to its n - 1 replicas, of P bytes of parameters or gradients and M microbatches, each
    times (n - 1) / n: ZeRO stage 0: 2 P. 1: P of gradients, P of parameters. 2: M P of gradients, P of parameters.
    3: M P of gradients, and up to 2 M P of parameters: what ends a pipeline stage's forward stays for its backward, and
    an embedding's backward needs no weights.
    """

    def __init__(
        self,
        stages: Sequence[PipelineStage],
        mesh: Mesh,
        dtype: torch.dtype,
        zero: ZeroConfig | None = None,
        trainable: bool = True,
        gradient_dtype: torch.dtype = torch.float32,
        reduce_dtype: torch.dtype | None = None,
    ) -> None:
        """reduce_dtype: None, as gradient_dtype."""
        zero = zero or ZeroConfig()
        whole = _KEPT_WHOLE[zero.stage]
        shards = not is_alone(mesh.replicas) and (trainable or not whole.parameters)
        self.mesh, self.dtype, self.prefetch = mesh, dtype, zero.prefetch
        self.zero_stage = zero.stage if shards else 0
        self.keeps_whole = _KEPT_WHOLE[self.zero_stage]
        self.units: list[FlatUnit] = []
        self.frozen: list[FlatUnit] = []
        self._unit_of: dict[nn.Parameter, FlatUnit] = {}
        self._paths = [[self._call(module, trainable) for module in stage.units()] for stage in stages]
        for stage, path in zip(stages, self._paths, strict=True):
            self._give_storage(stage)
            if not self.keeps_whole.optimizer:
                for i, module in enumerate(stage.units()):
                    _ModuleHooks(self, path, i).register(module)
        if trainable:
            self._prepare_gradients(gradient_dtype)
            self.reduce_dtype = reduce_dtype or gradient_dtype
        self._sums: deque[_Sum] = deque()

    def _call(self, module: nn.Module, trainable: bool) -> _ModuleCall:
        """Make units of the module's parameters that no module before it has: the frozen ones apart."""
        trained: list[ShardedParameter] = []
        frozen: list[ShardedParameter] = []
        for parameter in module.parameters():
            assert isinstance(parameter, ShardedParameter), "models are built of parallel layers"
            if parameter not in self._unit_of:
                (trained if parameter.requires_grad or not trainable else frozen).append(parameter)
        for new, unit_list in ((trained, self.units), (frozen, self.frozen)):
            if new:
                unit_list.append(self._unit(new))
                self._unit_of |= dict.fromkeys(new, unit_list[-1])
        units = dict.fromkeys(self._unit_of[parameter] for parameter in module.parameters())
        return _ModuleCall(tuple(units), getattr(module, "backward_reads_weights", True))

    def _unit(self, parameters: Sequence[ShardedParameter]) -> FlatUnit:
        sharded, frees = not self.keeps_whole.optimizer, not self.keeps_whole.parameters
        mesh = self.mesh
        return FlatUnit(parameters, mesh.replicas, self.dtype, mesh.device, sharded, frees)

    def _give_storage(self, stage: PipelineStage) -> None:
        """Put the parameters with storage, wherever modules hold them, in the place of those without."""
        for module in stage.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                assert parameter in self._unit_of, f"{name} is a parameter of no unit"
                setattr(module, name, self._unit_of[parameter].layout[parameter][0])
            for name, buffer in list(module.named_buffers(recurse=False)):
                setattr(module, name, buffer.to(self.mesh.device))

    # ---- a step's gradients ----

    def _prepare_gradients(self, dtype: torch.dtype) -> None:
        self.gradient_dtype = dtype
        for unit in self.units:
            unit.keep_gradients(dtype, whole=self.keeps_whole.gradients)
            for parameter, _ in unit.layout.values():
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
        """With the last addition to a unit, of the step or of a microbatch, start the sum over its group."""
        self._outstanding[unit] -= 1
        left = self._outstanding[unit]
        assert left >= 0, "more backward passes than begin_step announced"
        if not self.keeps_whole.gradients:
            if left % unit.uses == 0:
                first = left == unit.uses * (self._num_microbatches - 1)
                self._start_sum(unit, unit.detach(), add=not first)
        elif left == 0 and not is_alone(unit.group):
            assert unit.whole_gradients is not None
            self._start_sum(unit, unit.whole_gradients, add=False)

    def _start_sum(self, unit: FlatUnit, gradients: Tensor, add: bool) -> None:
        while self._sums and self._are_enough(self._sums[-1]):
            self._finish_sum()
        flying: SumInFlight | AllReduceInFlight
        if self.keeps_whole.optimizer:
            flying = AllReduceInFlight(gradients, unit.group, self.reduce_dtype)
        else:
            flying = SumInFlight(gradients, unit.group, self.reduce_dtype, in_place=True)
        passing = gradients.nbytes if not self.keeps_whole.gradients and flying.sent is gradients else 0
        self._sums.append(_Sum(unit, flying, add, passing + flying.nbytes))

    def _are_enough(self, last: _Sum) -> bool:
        """Whether one more sum like the last one would make it more memory than one unit's gradients take."""
        return (len(self._sums) + 1) * last.nbytes > last.unit.size * self.gradient_dtype.itemsize

    def _finish_sum(self) -> None:
        done = self._sums.popleft()
        done.flying.finish(done.unit.gradients, done.add)

    def finish_gradients(self) -> None:
        """Wait for the sums over the replicas; then sum what is partial over other groups."""
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
        """Bytes that this rank sends to its replicas: for each microbatch, at most, and once a step."""
        share = 1 - 1 / self.mesh.replicas.size()
        gradients = sum(unit.size for unit in self.units) * self.reduce_dtype.itemsize
        parameters = sum(unit.size for unit in self.units) * self.dtype.itemsize
        gathered = sum(
            unit.size * (1 + (call.backward_reads_weights and call is not path[-1]))
            for path in self._paths
            for call in path
            for unit in call.units
        )
        each, once = {
            0: (0, 2 * gradients),
            1: (0, gradients + parameters),
            2: (gradients, parameters),
            3: (gradients + gathered * self.dtype.itemsize, 0),
        }[self.zero_stage]
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
        passing = [unit.whole_gradients for unit in self.units if not self.keeps_whole.gradients]
        whole = sum(gradients.nbytes for gradients in passing if gradients is not None)
        return whole + sum(done.nbytes for done in self._sums)

    def gradient_norm(self) -> Tensor:
        """fp64 scalar: the L2 norm of the whole model's gradient, each element counted once, the same on all ranks."""
        squares = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        for unit, ranges in zip(self.units, self._owned, strict=True):
            for part in ranges if unit.replica_rank == 0 else []:  # of copies one is counted
                squares += squared_norm(unit.gradients[part])[0]
        return all_reduce_sum(squares, self.mesh.everyone).sqrt()

    # ---- parameters ----

    def all_gather_parameters(self, unit: FlatUnit) -> None:
        """Have the replicas know what was written into this rank's shard; the unit's next use waits for theirs.

        Nothing is sent where each has the whole unit to write into, or gathers it ahead of each use.
        """
        if self.keeps_whole.parameters and not self.keeps_whole.optimizer:
            unit.all_gather()

    def wait_all_gathers(self) -> None:
        """Wait for parameters that are on their way from other ranks."""
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
        self.wait_all_gathers()
        yield from self.pieces(trained)
        for unit in self.frozen:
            yield from unit.pieces(unit.parameters)

    def local_weights(self) -> Iterator[tuple[Piece, Tensor]]:
        """All weights whose values this rank knows, in the compute dtype; no rank changes them meanwhile."""
        self.wait_all_gathers()
        for unit in (*self.units, *self.frozen):
            if unit.frees:
                yield from unit.pieces(unit.parameters)
            else:
                for parameter, _ in unit.layout.values():
                    yield from ((piece, piece.view(parameter.data)) for piece in parameter.pieces)

    @property
    def replica(self) -> ProcessGroup:
        """The ranks whose shards together are one copy of this pipeline stage."""
        return self.mesh.tensor if self.keeps_whole.optimizer else self.mesh.stage_group

    @property
    def num_replicas(self) -> int:
        """How many copies of this pipeline stage there are."""
        return self.mesh.replicas.size() if self.keeps_whole.optimizer else 1

    @property
    def replica_rank(self) -> int:
        """Which of them this rank has a part of."""
        return self.mesh.replicas.rank() if self.keeps_whole.optimizer else 0


class _ModuleHooks:
    """What is done with a module's units as microbatches pass it, forward and backward; named as in FSDP."""

    def __init__(self, flat: FlatParameters, path: Sequence[_ModuleCall], index: int) -> None:
        """path: the calls of a pipeline stage, of which this one has number `index`."""
        self.flat, self.path, self.index, self.call = flat, path, index, path[index]

    def register(self, module: nn.Module) -> None:
        """Follow the module's calls, and their way back through autograd.

        Of several results the first is the one that the module computes last: its way back begins there.
        """

        def before(_: nn.Module, args: tuple[Any, ...]) -> None:
            self.pre_forward()
            if torch.is_grad_enabled() and isinstance(args[0], Tensor) and args[0].requires_grad:
                args[0].register_hook(lambda _: self.post_backward())

        def after(_: nn.Module, args: tuple[Any, ...], output: Tensor | tuple[Tensor, ...]) -> None:
            self.post_forward(torch.is_grad_enabled())
            last = output if isinstance(output, Tensor) else output[0]
            if last.requires_grad:
                last.register_hook(lambda _: self.pre_backward())

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)

    def pre_forward(self) -> None:
        following = self.path[self.index + 1 : self.index + 1 + self.flat.prefetch]
        self._gather(following)

    def post_forward(self, training: bool) -> None:
        """Backward begins with the last call: what that gathered may stay."""
        if not (training and self.index + 1 == len(self.path)):
            self._release()

    def pre_backward(self) -> None:
        previous = self.path[max(0, self.index - self.flat.prefetch) : self.index]
        if self.call.backward_reads_weights:
            self._gather([call for call in reversed(previous) if call.backward_reads_weights])
        for unit in self.call.units:
            if not self.flat.keeps_whole.gradients and unit.trained and unit.whole_gradients is None:
                unit.attach(torch.empty(unit.size, dtype=self.flat.gradient_dtype, device=unit.whole.device))

    def post_backward(self) -> None:
        self._release()

    def _gather(self, soon: Sequence[_ModuleCall]) -> None:
        """Have the module's units whole, and those of the calls that come soon on their way."""
        if not self.flat.keeps_whole.parameters:
            for unit in (unit for each in (self.call, *soon) for unit in each.units):
                if not unit.gathered:
                    unit.all_gather()
        for unit in self.call.units:
            unit.wait()

    def _release(self) -> None:
        if not self.flat.keeps_whole.parameters:
            for unit in self.call.units:
                unit.release()


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
