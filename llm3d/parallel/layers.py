"""Tensor-parallel layers: parallel by construction, plain layers on a group of one.

Weight gradients never pass through `.grad`: each layer adds them to its parameter's `main_grad`, in fp32 one matrix
product that accumulates, and tells the parameter so (`FlatParameters` then sums whole units over the data group while
the rest of the backward pass still runs).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from llm3d.kernels.accumulate import accumulate_
from llm3d.kernels.counter_rng import keep_mask
from llm3d.kernels.function import Operation
from llm3d.kernels.linear import add_linear_weight_gradient_, linear, linear_input_gradient
from llm3d.kernels.rms_norm import add_rms_norm_forward, rms_norm_backward, rms_norm_forward
from llm3d.parallel.boxes import Box, Piece, ShardedParameter
from llm3d.parallel.collectives import (
    SumInFlight,
    all_reduce_partial_sums,
    gather_rows,
    is_alone,
    reduce_scatter_tokens,
)


class Source(NamedTuple):
    """What a linear layer's input is made of again in backward, where it is not kept: cheap, and no matrix product.

    Megatron-LM's recompute_modules layernorm and mlp_act.
    """

    function: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]  # kept instead; others keep them, too


class ColumnParallelLinear(nn.Module):
    """y = x W^T, plus a bias where there is one, with the rows of W (output features) spread over the tensor group.

    x: [tokens, in], or this rank's [tokens / n, in] under sequence parallelism -> [tokens, out / n].
    Forward: nothing, or all_gather of x. Backward: all_reduce or reduce_scatter of the gradient of x, while the
    gradient of W is computed. Shoeybi et al. 2019, section 3; Korthikanti et al. 2022, section 4.2.2.
    """

    def __init__(
        self,
        pieces: Sequence[Piece],
        group: ProcessGroup,
        sequence_parallel: bool = False,
        adapters: Sequence[LowRankAdapter] = (),
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.weight = ShardedParameter.on_meta(pieces)
        self.bias = ShardedParameter.on_meta([bias_of_rows(piece) for piece in pieces]) if bias else None
        self.group, self.sequence_parallel = group, sequence_parallel
        self.adapters = nn.ModuleList(adapters)

    def forward(self, x: Tensor, keys: Tensor | None = None, source: Source | None = None) -> Tensor:
        """keys: int64 [tokens], of what adapters drop; None: nothing is dropped. source: of x; None: x is kept."""
        group = _several(self.group)
        y = _linear(x, self.weight, group, self.sequence_parallel, self.adapters, keys, source)
        return y if self.bias is None else _AddBias.of(y, self.bias)


class RowParallelLinear(nn.Module):
    """y = x W^T, plus a bias where there is one, with the columns of W (input features) spread over the tensor group.

    x: [tokens, in / n] -> [tokens, out], or this rank's [tokens / n, out] under sequence parallelism.
    Forward: all_reduce or reduce_scatter of y. Backward: nothing, or all_gather of the gradient of y.
    Every rank has the whole bias. It is added once to what has been summed; under sequence parallelism each rank adds
    it to its share of the tokens, so that its gradient is a partial sum over the group.
    """

    def __init__(
        self,
        piece: Piece,
        group: ProcessGroup,
        sequence_parallel: bool = False,
        adapters: Sequence[LowRankAdapter] = (),
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.weight = ShardedParameter.on_meta([piece])
        self.bias: ShardedParameter | None = None
        if bias:
            partial = group if sequence_parallel and not is_alone(group) else None
            whole = Piece(_bias_box(piece.box), owned=group.rank() == 0, partial=partial)
            self.bias = ShardedParameter.on_meta([whole])
        self.group, self.sequence_parallel = group, sequence_parallel
        self.adapters = nn.ModuleList(adapters)

    def forward(self, x: Tensor, keys: Tensor | None = None, source: Source | None = None) -> Tensor:
        """keys, source: as for ColumnParallelLinear."""
        y = _linear(x, self.weight, None, False, self.adapters, keys, source)
        reduce = reduce_scatter_tokens if self.sequence_parallel else all_reduce_partial_sums
        y = reduce(y, self.group)
        return y if self.bias is None else _AddBias.of(y, self.bias)


class LowRankAdapter(nn.Module):
    """scale B A dropout(x), added to rows `rows` of a linear layer's output. Hu et al. 2021 (LoRA).

    a: [rank, in], b: [rows, rank], each the part that goes with the layer's part of W. In a column-parallel layer
    every rank has all of A, in a row-parallel one all of B; the gradient of that factor is a partial sum over the
    group. Nothing is communicated beyond what the layer does.
    """

    def __init__(self, a: Piece, b: Piece, rows: slice, scale: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.a, self.b = ShardedParameter.on_meta([a]), ShardedParameter.on_meta([b])
        self.rows, self.scale, self.dropout = rows, scale, dropout
        self.stream = zlib.crc32(a.box.name.encode())  # of its random numbers
        self.enabled = True

    def dropped(self, x: Tensor, keys: Tensor | None) -> Tensor:
        """x, [tokens, in], with some of its elements 0 and the others larger; the same ones in forward and backward."""
        if keys is None or not self.dropout:
            return x
        offset = self.a.pieces[0].box.offset[1]
        keep = keep_mask(keys, self.stream, offset, x.shape[1], self.dropout)
        return torch.where(keep, x / (1 - self.dropout), 0)


class VocabParallelEmbedding(nn.Module):
    """Rows of a table [vocab, hidden] that is spread over the tensor group by vocabulary.

    tokens: int64 [tokens] -> [tokens, hidden], or this rank's [tokens / n, hidden] under sequence parallelism.
    A vocabulary that the group's size does not divide leaves the last ranks fewer rows: nothing is padded.
    Forward: all_reduce or reduce_scatter. Backward: nothing, or all_gather of the gradient.
    """

    backward_reads_weights = False

    def __init__(
        self,
        box: Box,
        group: ProcessGroup,
        sequence_parallel: bool = False,
        partial: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.vocabulary = vocabulary_range(box.size[0], group)
        part = box.rows(self.vocabulary.start, len(self.vocabulary))
        self.weight = ShardedParameter.on_meta([Piece(part, partial=partial)])
        self.group, self.sequence_parallel = group, sequence_parallel

    def forward(self, tokens: Tensor) -> Tensor:
        y = _Embedding.of(self.weight, tokens, self.vocabulary.start, self.group.size() > 1)
        reduce = reduce_scatter_tokens if self.sequence_parallel else all_reduce_partial_sums
        return reduce(y, self.group)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, after x has been added to the residual stream.

    partial: each rank of the group normalizes a part, some tokens (sequence parallelism) or some heads, so that the
        weight's gradient is a partial sum over the group.
    Zhang and Sennrich 2019.
    """

    def __init__(self, box: Box, eps: float, group: ProcessGroup, partial: bool = False) -> None:
        super().__init__()
        summed = group if partial and not is_alone(group) else None
        self.weight = ShardedParameter.on_meta([Piece(box, owned=group.rank() == 0, partial=summed)])
        self.eps = eps

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x, residual: [tokens, hidden] -> the norm of their sum, and the sum; one pass over memory.

        The sum is written over x. Without a residual the sum is x. Backward adds the gradient of the norm to that of
        the sum, in one pass too.
        """
        return _RMSNorm.of(x, residual, self.weight, self.eps)

    def again(self, total: Tensor) -> Tensor:
        """The norm of a sum, bit for bit; without backward."""
        return rms_norm_forward(total, self.weight, self.eps)[0]


def bias_of_rows(piece: Piece) -> Piece:
    """The elements of a linear layer's bias that go with some rows of its weight, on the same ranks."""
    first, count = piece.box.offset[0], piece.box.size[0]
    return replace(piece, box=_bias_box(piece.box).rows(first, count))


def _bias_box(weight: Box) -> Box:
    """All of the bias, [out], named as in PyTorch, of a linear layer's weight [out, in]."""
    return Box.whole(f"{weight.name.removesuffix('.weight')}.bias", weight.shape[:1])


def split_evenly(extent: int, group: ProcessGroup) -> range:
    """This rank's part of range(extent); the group's size divides it."""
    assert extent % group.size() == 0, "configuration guarantees divisibility"
    part = extent // group.size()
    return range(group.rank() * part, (group.rank() + 1) * part)


def vocabulary_range(vocab_size: int, group: ProcessGroup) -> range:
    """This rank's token ids: ceil(vocab / n) each, the last ranks what is left."""
    part = -(-vocab_size // group.size())
    start = min(group.rank() * part, vocab_size)
    return range(start, min(start + part, vocab_size))


def column_parallel_linear(
    x: Tensor,
    weight: ShardedParameter,
    group: ProcessGroup,
    sequence_parallel: bool = False,
) -> Tensor:
    """x: [tokens, in] -> [tokens, weight rows]; see ColumnParallelLinear. Also used with a tied embedding's weight."""
    return _linear(x, weight, _several(group), sequence_parallel, (), None, None)


def _several(group: ProcessGroup) -> ProcessGroup | None:
    return None if is_alone(group) else group


def _linear(
    x: Tensor,
    weight: ShardedParameter,
    group: ProcessGroup | None,
    sequence_parallel: bool,
    adapters: Iterable[nn.Module],
    keys: Tensor | None,
    source: Source | None,
) -> Tensor:
    active = [each for each in adapters if isinstance(each, LowRankAdapter) and each.enabled]
    factors = [factor for adapter in active for factor in (adapter.a, adapter.b)]  # for autograd to see
    return _Linear.of(x, weight, group, sequence_parallel, active, keys, source, *factors)


def add_to_main_grad(weight: ShardedParameter, gradient: Tensor) -> None:
    """Add a gradient shaped like the weight to its sum."""
    _add(weight, gradient)
    weight.accumulated()


def add_rows_to_main_grad(weight: ShardedParameter, rows: Tensor, gradient: Tensor) -> None:
    """main_grad[rows[i]] += gradient[i]. rows: int64 [tokens], gradient: [tokens, hidden]; nothing of the table's size.

    The same row's gradients are summed in fp32: into main_grad, or first by themselves where that is narrower.
    Deterministic on a GPU, too, where torch.use_deterministic_algorithms asks for it.
    """
    main_grad = weight.main_grad
    assert main_grad is not None, "FlatParameters gives trainable parameters a main_grad"
    if weight.main_grad_is_stale:
        main_grad.zero_()
        weight.main_grad_is_stale = False
    gradient = gradient.float()
    if main_grad.dtype != torch.float32:
        rows, gradient = _sums_of_equal(rows, gradient, len(weight))
    main_grad.index_add_(0, rows, gradient.to(main_grad.dtype))


def _sums_of_equal(rows: Tensor, gradient: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """The sum of each row's gradients, and zeros for any row, so many that the host need not wait to know how many."""
    ordered, order = rows.sort(stable=True)
    place = (ordered.diff(prepend=ordered[:1]) != 0).cumsum(0)  # among the different ones
    sums = torch.zeros_like(gradient).index_add_(0, place, gradient[order])
    any_rows = torch.arange(len(rows), device=rows.device).remainder(num_rows)
    return any_rows.index_copy_(0, place, ordered), sums


def add_linear_gradient(weight: ShardedParameter, grad_output: Tensor, x: Tensor) -> None:
    """main_grad += grad_output^T x; the last of a microbatch's additions is followed by weight.accumulated()."""
    assert weight.main_grad is not None, "FlatParameters gives trainable parameters a main_grad"
    add_linear_weight_gradient_(weight.main_grad, grad_output, x, replace=weight.main_grad_is_stale)
    weight.main_grad_is_stale = False


def _add(weight: ShardedParameter, gradient: Tensor) -> None:
    assert weight.main_grad is not None, "FlatParameters gives trainable parameters a main_grad"
    if weight.main_grad_is_stale:
        weight.main_grad.copy_(gradient)
        weight.main_grad_is_stale = False
    else:
        accumulate_(weight.main_grad, gradient)


class _Linear(Operation):
    """x W^T and what adapters add to it; with a group, column-parallel over it.

    Collectives run beside matrix products: see the order of the lines in backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: ShardedParameter,
        group: ProcessGroup | None,
        sequence: bool,
        adapters: Sequence[LowRankAdapter],
        keys: Tensor | None,
        source: Source | None,
        *factors: Tensor,
    ) -> Tensor:
        ctx.weight, ctx.group, ctx.sequence, ctx.adapters, ctx.keys = weight, group, sequence, adapters, keys
        whole = gather_rows(x, group)[0] if group is not None and sequence else x
        y = linear(whole, weight)
        inner = [linear(adapter.dropped(whole, keys), adapter.a) for adapter in adapters]
        for adapter, h in zip(adapters, inner, strict=True):
            y[:, adapter.rows].addmm_(h, adapter.b.t(), alpha=adapter.scale)
        # Of x only this rank's tokens are kept, and only where a gradient needs them; backward gathers them again.
        source = source or Source(lambda kept: kept, (x,))
        ctx.function, needed = source.function, ctx.needs_input_grad[1] or adapters
        ctx.save_for_backward(*inner, *(source.inputs if needed else ()))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_output,), saved = grads, ctx.saved_tensors
        inner, inputs = saved[: len(ctx.adapters)], saved[len(ctx.adapters) :]
        x: Any = ctx.function(*inputs) if inputs else None
        weight, group, gathering, summing = ctx.weight, ctx.group, None, None
        if x is not None and group is not None and ctx.sequence:
            x, gathering = gather_rows(x, group, async_op=True)
        grad_inner = [
            adapter.scale * linear_input_gradient(grad_output[:, adapter.rows], adapter.b)
            for adapter in ctx.adapters
        ]
        grad_input = linear_input_gradient(grad_output, weight) if ctx.needs_input_grad[0] else None
        if grad_input is not None:
            for adapter, grad_h in zip(ctx.adapters, grad_inner, strict=True):
                grad_input += adapter.dropped(linear_input_gradient(grad_h, adapter.a), ctx.keys)
            summing = _start_sum(grad_input, group, ctx.sequence)
        if gathering is not None:
            gathering.wait()
        if ctx.needs_input_grad[1]:
            add_linear_gradient(weight, grad_output, x)
            weight.accumulated()
        for adapter, h, grad_h in zip(ctx.adapters, inner, grad_inner, strict=True):
            add_linear_gradient(adapter.a, grad_h, adapter.dropped(x, ctx.keys))
            adapter.a.accumulated()
            add_linear_gradient(adapter.b, grad_output[:, adapter.rows], adapter.scale * h)
            adapter.b.accumulated()
        if isinstance(summing, SumInFlight):
            grad_input = summing.finish()
        elif summing is not None:
            summing.wait()
        return grad_input, *[None] * (6 + 2 * len(ctx.adapters))


class _AddBias(Operation):
    """y + bias, written over y."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, bias: ShardedParameter) -> Tensor:
        ctx.mark_dirty(y)
        ctx.bias = bias
        return y.add_(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (gradient,), bias = grads, ctx.bias
        if ctx.needs_input_grad[1]:
            add_to_main_grad(bias, gradient.sum(0, dtype=torch.float32))
        return gradient, None


def _start_sum(x: Tensor, group: ProcessGroup | None, sequence: bool) -> SumInFlight | dist.Work | None:
    """Start to sum a gradient over the group: in place, or under sequence parallelism to this rank's tokens of it."""
    if group is None:
        return None
    return SumInFlight(x, group) if sequence else dist.all_reduce(x, group=group, async_op=True)


class _Embedding(Operation):
    """Rows of the table; zeros for the tokens that other ranks have, where the table is in parts."""

    @staticmethod
    def forward(ctx: Any, weight: ShardedParameter, tokens: Tensor, first: int, in_parts: bool) -> Tensor:
        rows, elsewhere, ctx.weight = tokens, None, weight
        if in_parts:
            rows = tokens - first
            elsewhere = ((rows < 0) | (rows >= len(weight)))[:, None]
            rows = rows.remainder(max(1, len(weight)))  # some row, to which zeros are added
        ctx.save_for_backward(rows, elsewhere)
        if not len(weight):
            return weight.new_zeros(len(tokens), weight.shape[1])
        y = torch.nn.functional.embedding(rows, weight)
        return y if elsewhere is None else y.masked_fill_(elsewhere, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None, None]:
        (gradient,), (rows, elsewhere), weight = grads, ctx.saved_tensors, ctx.weight
        if len(weight):
            add_rows_to_main_grad(
                weight, rows, gradient if elsewhere is None else gradient.masked_fill(elsewhere, 0)
            )
        weight.accumulated()
        return None, None, None, None


class _RMSNorm(Operation):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: ShardedParameter, eps: float
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)  # nothing goes on from the sum that the last norm is made of
        if residual is None:
            y, inverse_rms = rms_norm_forward(x, weight, eps)
        else:
            y, inverse_rms = add_rms_norm_forward(x, residual, weight, eps)
            ctx.mark_dirty(x)
        ctx.save_for_backward(x, inverse_rms)
        ctx.weight, ctx.added = weight, residual is not None
        return y, x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_y, grad_sum = (None if grad is None else grad.contiguous() for grad in grads)
        assert grad_y is not None, "the norm is what it was computed for"
        x, inverse_rms = ctx.saved_tensors
        grad_input, grad_weight = rms_norm_backward(grad_y, x, ctx.weight, inverse_rms, grad_sum)
        if ctx.needs_input_grad[2]:
            add_to_main_grad(ctx.weight, grad_weight)
        return grad_input, grad_input if ctx.added else None, None, None
