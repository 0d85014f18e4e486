"""All parameters of a rank in one flat tensor, their gradients in another, reduced in buckets.

The optimiser then works on whole flat tensors, gradients are summed over the data group in few large messages
that start while the backward pass still runs, and checkpoints see every flat tensor as boxes of global ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from llm3d.kernels.gradient_norm import squared_norm
from llm3d.parallel.boxes import Piece, ShardedParameter
from llm3d.parallel.mesh import Mesh

BUCKET_BYTES = 64 * 2**20


@dataclass
class Bucket:
    """A range of the flat gradients that is summed over the data group in one message."""

    gradients: Tensor
    uses: int  # additions to its gradients a microbatch
    outstanding: int = 0
    work: dist.Work | None = field(default=None, repr=False)


class FlatParameters:
    """Gives storage to the parameters of `modules` (the stages of this rank, in model order).

    parameters: [n], the compute dtype; each ShardedParameter becomes a view of it.
    gradients: fp32 [n]; each `main_grad` is a view of it. Absent with trainable=False.
    Matrices come first, in the order in which backward finishes them, then vectors (norms), which are exempt
    from weight decay: `num_decayed` elements are before the first vector.
    """

    def __init__(
        self, modules: Sequence[nn.Module], mesh: Mesh, dtype: torch.dtype, trainable: bool = True
    ) -> None:
        self.mesh, self.modules = mesh, list(modules)
        parameters = _in_backward_order(self.modules)
        matrices = [p for p in parameters if p.dim() > 1]
        ordered = matrices + [p for p in parameters if p.dim() == 1]
        self.num_decayed = sum(p.numel() for p in matrices)
        self.parameters = torch.empty(sum(p.numel() for p in ordered), dtype=dtype, device=mesh.device)
        self._placed: list[tuple[ShardedParameter, int]] = []
        self._place(ordered)
        self.buckets: list[Bucket] = []
        if trainable:
            self.gradients = torch.zeros_like(self.parameters, dtype=torch.float32)
            self._owned = self._owned_ranges()
            self._make_buckets()

    def _place(self, ordered: list[ShardedParameter]) -> None:
        """Replace each meta parameter, wherever modules hold it, by one with storage in the flat tensor."""
        replacement: dict[int, ShardedParameter] = {}
        start = 0
        for parameter in ordered:
            data = self.parameters[start : start + parameter.numel()].view(parameter.shape)
            replacement[id(parameter)] = ShardedParameter(data, parameter.pieces, parameter.uses)
            self._placed.append((replacement[id(parameter)], start))
            start += parameter.numel()
        for module in self.modules:
            for submodule in module.modules():
                for name, on_meta in list(submodule.named_parameters(recurse=False)):
                    setattr(submodule, name, replacement[id(on_meta)])
                for name, buffer in list(submodule.named_buffers(recurse=False)):
                    setattr(submodule, name, buffer.to(self.mesh.device))

    def _make_buckets(self) -> None:
        """Consecutive parameters up to BUCKET_BYTES; vectors have buckets of their own."""
        members: list[tuple[ShardedParameter, int]] = []
        for index, (parameter, start) in enumerate(self._placed):
            parameter.main_grad = self.gradients[start : start + parameter.numel()].view(parameter.shape)
            members.append((parameter, start))
            size = 4 * (start + parameter.numel() - members[0][1])
            last = index + 1 == len(self._placed)
            if last or size >= BUCKET_BYTES or self._placed[index + 1][1] == self.num_decayed:
                self._close_bucket(members)
                members = []

    def _close_bucket(self, members: list[tuple[ShardedParameter, int]]) -> None:
        stop = members[-1][1] + members[-1][0].numel()
        bucket = Bucket(self.gradients[members[0][1] : stop], sum(p.uses for p, _ in members))
        for parameter, _ in members:
            parameter.on_accumulated = lambda bucket=bucket: self._accumulated(bucket)
        self.buckets.append(bucket)

    def begin_step(self, num_microbatches: int) -> None:
        """Zero the gradients and expect backward passes of `num_microbatches` microbatches."""
        self.gradients.zero_()
        for bucket in self.buckets:
            bucket.outstanding = bucket.uses * num_microbatches

    def _accumulated(self, bucket: Bucket) -> None:
        """With the step's last addition to a bucket, start its sum over the data group."""
        bucket.outstanding -= 1
        assert bucket.outstanding >= 0, "more backward passes than begin_step announced"
        if bucket.outstanding == 0 and self.mesh.data_size > 1:
            bucket.work = dist.all_reduce(bucket.gradients, group=self.mesh.data, async_op=True)

    def finish_gradients(self) -> None:
        """Wait for the sums over the data group; then sum what is partial over other groups.

        Each rank sends about 2 (n - 1) / n of its gradients, fp32, over the data group of n.
        """
        for bucket in self.buckets:
            assert bucket.outstanding == 0, "fewer backward passes than begin_step announced"
            if bucket.work is not None:
                bucket.work.wait()
                bucket.work = None
        for group, views in self._partial_gradients().items():
            message = torch.cat([view.reshape(-1) for view in views])
            dist.all_reduce(message, group=group)
            for view, total in zip(views, message.split([view.numel() for view in views]), strict=True):
                view.copy_(total.view_as(view))

    def _partial_gradients(self) -> dict[ProcessGroup, list[Tensor]]:
        views: dict[ProcessGroup, list[Tensor]] = {}
        for piece, view in self.pieces(self.gradients):
            if piece.partial is not None:
                views.setdefault(piece.partial, []).append(view)
        return views

    def gradient_norm(self) -> Tensor:
        """fp64 scalar: the L2 norm of the whole model's gradient, each element counted once, the same on all ranks."""
        squares = sum(
            (squared_norm(self.gradients[part])[0] for part in self._owned),
            start=self.gradients.new_zeros((), dtype=torch.float64),
        )
        dist.all_reduce(squares, group=self.mesh.model)
        return squares.sqrt()

    def _owned_ranges(self) -> list[slice]:
        """The parts of a flat tensor that this rank owns, as long as they can be."""
        ranges: list[slice] = []
        for piece, view in self.pieces(torch.empty(len(self.parameters), device="meta")):
            start = int(view.storage_offset())
            assert view.is_contiguous(), "a piece is whole rows of its parameter"
            if piece.owned and ranges and ranges[-1].stop == start:
                ranges[-1] = slice(ranges[-1].start, start + view.numel())
            elif piece.owned:
                ranges.append(slice(start, start + view.numel()))
        return ranges

    def pieces(self, flat: Tensor) -> Iterator[tuple[Piece, Tensor]]:
        """Each piece of each parameter with its view of `flat`, a tensor laid out like `parameters`."""
        for parameter, start in self._placed:
            local = flat[start : start + parameter.numel()].view(parameter.shape)
            for piece in parameter.pieces:
                if piece.box.numel:
                    yield piece, piece.view(local)


def _in_backward_order(modules: Sequence[nn.Module]) -> list[ShardedParameter]:
    """Parameters, last used first; a tied one where backward uses it last (the embedding)."""
    forward: dict[int, ShardedParameter] = {}
    for module in modules:
        for parameter in module.parameters():
            assert isinstance(parameter, ShardedParameter), "models are built of parallel layers"
            forward.setdefault(id(parameter), parameter)
    return list(reversed(forward.values()))
