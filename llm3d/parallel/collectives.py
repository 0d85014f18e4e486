"""Collectives, some with their backward; each is the identity on a group of one."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from llm3d.kernels.function import Operation
from llm3d.kernels.paper import is_cuda

# torch 2.13 renamed these two; 2.10 to 2.12 have only the old names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

_FEWEST = 2  # ranks that communicate; tests set it to 1, so that one GPU runs what several would


def is_alone(group: ProcessGroup) -> bool:
    """Whether this rank is the group's only one: nothing is sent then, and what was to be sent is the result."""
    return group.size() < _FEWEST


def gather_rows(x: Tensor, group: ProcessGroup, async_op: bool = False) -> tuple[Tensor, dist.Work | None]:
    """[rows, ...] of each rank -> [n * rows, ...] in rank order. Each rank receives n - 1 times x. No backward."""
    out = x.new_empty(x.shape[0] * group.size(), *x.shape[1:])
    return out, _all_gather(out, x.contiguous(), group=group, async_op=async_op)


def scatter_sum_rows(x: Tensor, group: ProcessGroup) -> Tensor:
    """[n * rows, ...], partial sums -> this rank's [rows, ...] of the sum. No backward.

    Each rank sends (n - 1) / n of x.
    """
    return SumInFlight(x, group).finish()


def start_gather(x: Tensor, into: Tensor, group: ProcessGroup) -> dist.Work:
    """Start to fill `into`, flat [n * size], with each rank's x, flat [size]; x may be this rank's part of it.

    Each rank receives n - 1 times x.
    """
    work = _all_gather(into, x, group=group, async_op=True)
    assert work is not None, "this rank is in the group"
    return work


class SumInFlight:
    """A tensor, [n * rows, ...], being summed over a group of n ranks; of the sum this rank gets its [rows, ...].

    dtype: what travels and is summed, if not x's own.  in_place: x is of no use afterwards, and may hold the result.

    Each rank sends (n - 1) / n of x. NCCL sums in `dtype`, into this rank's part of what it sends. Gloo's
    reduce-scatter is two to eight times slower than an exchange of all parts; their sum is then taken here, in rank
    order, of narrower types in fp32.
    """

    def __init__(
        self, x: Tensor, group: ProcessGroup, dtype: torch.dtype | None = None, in_place: bool = False
    ) -> None:
        rows, rest = divmod(x.shape[0], group.size())
        assert rest == 0, "configuration guarantees that tensor divides the tokens of a microbatch"
        self.sent = x.to(dtype or x.dtype).contiguous()
        copied, exchanges = self.sent is not x, not is_cuda(x)
        own = self.sent[group.rank() * rows : (group.rank() + 1) * rows]
        if exchanges:
            self.result = torch.empty_like(self.sent)
        else:
            self.result = own if in_place else torch.empty_like(own)
        start = dist.all_to_all_single if exchanges else _reduce_scatter
        work = start(self.result, self.sent, group=group, async_op=True)
        assert work is not None, "this rank is in the group"
        self.work, self.parts = work, group.size() if exchanges else 1
        self.nbytes = self.sent.nbytes * copied + self.result.nbytes * (self.result is not own)

    def finish(self, into: Tensor | None = None, add: bool = False) -> Tensor:
        """Wait; -> the sum, written into or added to `into`, which may be part of x, where that is given."""
        self.work.wait()
        if into is None and self.parts == 1:
            return self.result
        parts = self.result.unflatten(0, (self.parts, -1))
        if add:
            assert into is not None
            return into.add_(parts.sum(0, dtype=into.dtype) if self.parts > 1 else parts[0])
        if self.parts > 1:
            return torch.sum(parts, 0, out=into)
        assert into is not None
        return into if into.data_ptr() == self.result.data_ptr() else into.copy_(parts[0])


class AllReduceInFlight:
    """A tensor being summed over a group of n ranks, in `dtype`; every rank gets all of the sum.

    Each rank sends about 2 (n - 1) / n of x.
    """

    def __init__(self, x: Tensor, group: ProcessGroup, dtype: torch.dtype) -> None:
        self.sent = x.to(dtype)
        self.nbytes = 0 if self.sent is x else self.sent.nbytes
        work = dist.all_reduce(self.sent, group=group, async_op=True)
        assert work is not None, "this rank is in the group"
        self.work = work

    def finish(self, into: Tensor, add: bool = False) -> Tensor:
        """Wait; -> the sum, in `into`, all of x."""
        assert not add, "there is one sum a step"
        self.work.wait()
        return into.copy_(self.sent) if self.nbytes else into


class _AllReduce(Operation):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        dist.all_reduce(x, group=group)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _ReduceScatterTokens(Operation):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return scatter_sum_rows(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return gather_rows(grads[0], ctx.group)[0], None


class _GatherEqualGradients(Operation):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group, ctx.rows = group, len(x)
        return gather_rows(x, group)[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        start = ctx.group.rank() * ctx.rows
        return grads[0][start : start + ctx.rows], None


def all_reduce_partial_sums(x: Tensor, group: ProcessGroup) -> Tensor:
    """Sum x over the tensor group, in place.

    x: [tokens, hidden], partial sums -> [tokens, hidden], the same on all ranks.
    Each rank sends about 2 (n - 1) / n of x. Backward: identity (the gradient is the same on all ranks).
    Shoeybi et al. 2019, section 3, the operator g.
    """
    return x if is_alone(group) else _AllReduce.of(x, group)


def reduce_scatter_tokens(x: Tensor, group: ProcessGroup) -> Tensor:
    """Sum partial results over the tensor group; keep this rank's share of the tokens.

    x: [tokens, hidden], partial sums  ->  [tokens / n, hidden], n = group.size().
    Each rank sends (n - 1) / n of x. Backward: all_gather of the tokens.
    Sequence parallelism, Korthikanti et al. 2022, section 4.2.2.
    """
    return x if is_alone(group) else _ReduceScatterTokens.of(x, group)


def gather_equal_gradients(x: Tensor, group: ProcessGroup) -> Tensor:
    """Gather the ranks' shares of the tokens, for ranks that then all compute the same.

    x: [tokens / n, ...] -> [tokens, ...]. Each rank receives n - 1 times x. Backward: this rank's share of the
    gradient, which every rank has whole; nothing is sent.
    """
    return x if is_alone(group) else _GatherEqualGradients.of(x, group)


def all_reduce_sum(x: Tensor, group: ProcessGroup) -> Tensor:
    """Sum x over the group, in place, without a backward; returns x."""
    if not is_alone(group):
        dist.all_reduce(x, group=group)
    return x


def all_reduce_max(x: Tensor, group: ProcessGroup) -> Tensor:
    """The elements' largest over the group, in place, without a backward; returns x."""
    if not is_alone(group):
        dist.all_reduce(x, op=dist.ReduceOp.MAX, group=group)
    return x


def gather_bytes(payload: bytes, group: ProcessGroup) -> list[bytes]:
    """Each rank's bytes, in rank order, on every rank; over CPU tensors, without pickle."""
    if is_alone(group):
        return [payload]
    sizes = torch.zeros(group.size(), dtype=torch.int64)
    sizes[group.rank()] = len(payload)
    dist.all_reduce(sizes, group=group)
    longest = int(sizes.max())
    if not longest:
        return [b""] * group.size()
    mine = torch.zeros(longest, dtype=torch.uint8)
    mine[: len(payload)] = torch.frombuffer(bytearray(payload), dtype=torch.uint8) if payload else mine[:0]
    everyone = torch.empty(group.size() * longest, dtype=torch.uint8)
    _all_gather(everyone, mine, group=group)
    return [bytes(everyone[i * longest : i * longest + int(n)].numpy()) for i, n in enumerate(sizes)]
