"""The parameters of one module in flat tensors, whole or this rank's shard of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from llm3d.parallel.boxes import Piece, ShardedParameter
from llm3d.parallel.collectives import start_gather

ALIGNMENT = 64  # elements; shards start on multiples of it


class FlatUnit:
    """Gives storage to the parameters of a unit: one flat tensor of `size` elements, matrices before vectors.

    Matrices come first because vectors (norms) are exempt from weight decay; zeros at the end make the size a multiple
    of num_shards * ALIGNMENT. Of the equal shards, this rank's is elements `start .. start + shard_size`.

    group: its ranks hold the same parameters: gradients are summed over them, and shards spread over them.
    num_replicas: how many ranks of the group hold what this one does: all, or with `sharded` none but itself.
    replica_rank: which of these this rank is.
    layout: by parameter without storage, the one with storage and its first element in `whole`.
    whole: [size], the compute dtype; each parameter is a view of it. Where `frees`, it has memory only from all_gather
        to release.
    parameters: [shard_size], this rank's shard: part of `whole`, or, where that is freed, by itself.
    whole_gradients: [size] or None; each parameter's main_grad is a view of it.
    gradients: [shard_size], this rank's shard of the step's gradient.
    trained: whether the parameters need gradients; all of a unit's do, or none does.
    """

    def __init__(
        self,
        parameters: Sequence[ShardedParameter],
        group: ProcessGroup,
        dtype: torch.dtype,
        device: torch.device,
        sharded: bool = False,
        frees: bool = False,
    ) -> None:
        self.group = group
        num_shards, shard = (group.size(), group.rank()) if sharded else (1, 0)
        self.num_replicas, self.replica_rank = (1, 0) if sharded else (group.size(), group.rank())
        matrices = [p for p in parameters if p.dim() > 1]
        ordered = matrices + [p for p in parameters if p.dim() == 1]
        self.num_elements = sum(p.numel() for p in ordered)
        self.num_decayed = sum(p.numel() for p in matrices)
        self.shard_size = -(-self.num_elements // (num_shards * ALIGNMENT)) * ALIGNMENT
        self.size, self.start = num_shards * self.shard_size, shard * self.shard_size
        self.frees = frees
        self.trained = all(p.requires_grad for p in ordered)
        self.whole = torch.zeros(self.size, dtype=dtype, device=device)
        self.layout: dict[nn.Parameter, tuple[ShardedParameter, int]] = {}
        start = 0
        for parameter in ordered:
            data = self.whole[start : start + parameter.numel()].view(parameter.shape)
            with_storage = ShardedParameter(data, parameter.pieces, parameter.uses, parameter.requires_grad)
            self.layout[parameter] = with_storage, start
            start += parameter.numel()
        self.parameters = self._shard_of(self.whole)
        self.gathering: dist.Work | None = None
        if frees:
            self.parameters = self.parameters.clone()
            self.release()
        self.whole_gradients: Tensor | None = None
        self.gradients: Tensor

    @property
    def uses(self) -> int:
        """Additions to the unit's gradients in one backward pass of a microbatch."""
        return sum(parameter.uses for parameter, _ in self.layout.values())

    def _shard_of(self, whole: Tensor) -> Tensor:
        return whole[self.start : self.start + self.shard_size]

    # ---- parameters ----

    def all_gather(self) -> None:
        """Start to fill `whole` from the shards of all ranks of the group; `wait` ends it.

        Each rank receives (n - 1) / n of the unit, compute dtype.
        """
        self.wait()
        if self.frees:
            self.whole.untyped_storage().resize_(self.whole.nbytes)
        self.gathering = start_gather(self.parameters, self.whole, self.group)

    def wait(self) -> None:
        """Return when `whole` is what it should be."""
        if self.gathering is not None:
            self.gathering.wait()
            self.gathering = None

    @property
    def gathered(self) -> bool:
        """Whether `whole` has memory."""
        return self.whole.untyped_storage().nbytes() > 0

    def release(self) -> None:
        """Give back the memory of `whole`."""
        self.wait()
        self.whole.untyped_storage().resize_(0)

    # ---- gradients ----

    def keep_gradients(self, dtype: torch.dtype, whole: bool) -> None:
        """Make room for gradients that stay from step to step: the whole unit's, or this rank's shard."""
        if whole:
            self.attach(torch.zeros(self.size, dtype=dtype, device=self.whole.device))
            assert self.whole_gradients is not None
            self.gradients = self._shard_of(self.whole_gradients)
        else:
            self.gradients = torch.zeros(self.shard_size, dtype=dtype, device=self.whole.device)

    def attach(self, gradients: Tensor) -> None:
        """Let backward write into `gradients`, [size]."""
        self.whole_gradients = gradients
        gradients[self.num_elements :].zero_()
        for parameter, start in self.layout.values():
            parameter.main_grad = gradients[start : start + parameter.numel()].view(parameter.shape)
        self.forget_gradients()

    def forget_gradients(self) -> None:
        """The next addition to each gradient replaces what is there."""
        for parameter, _ in self.layout.values():
            parameter.main_grad_is_stale = True

    def detach(self) -> Tensor:
        """Take back what `attach` gave."""
        gradients, self.whole_gradients = self.whole_gradients, None
        assert gradients is not None, "detach follows attach"
        for parameter, _ in self.layout.values():
            parameter.main_grad = None
        return gradients

    # ---- coordinates ----

    def decayed(self) -> int:
        """How many elements, from the start of this rank's shard, are of matrices."""
        return min(max(0, self.num_decayed - self.start), self.shard_size)

    def pieces(self, shard: Tensor) -> Iterator[tuple[Piece, Tensor]]:
        """What `shard`, laid out like `parameters`, holds: pieces, each of one box, with their views."""
        for piece, begin, where in self.spans():
            at = where.start
            for box in piece.box.elements(begin, where.stop - where.start):
                row = piece.row + box.offset[0] - piece.box.offset[0]
                yield replace(piece, box=box, row=row), shard[at : at + box.numel].view(box.size)
                at += box.numel

    def spans(self) -> Iterator[tuple[Piece, int, slice]]:
        """What this rank's shard holds: a parameter's piece, from which of its elements on, and where in the shard."""
        for parameter, start in self.layout.values():
            columns = parameter.numel() // max(1, len(parameter))
            for piece in parameter.pieces:
                first = start + piece.row * columns
                begin = max(first, self.start)
                end = min(first + piece.box.numel, self.start + self.shard_size)
                if begin < end:
                    yield piece, begin - first, slice(begin - self.start, end - self.start)
