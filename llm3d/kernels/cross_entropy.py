"""The two passes over the logits that a cross-entropy makes, for one part of the vocabulary.

`llm3d.parallel.cross_entropy` puts the parts together.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from llm3d.kernels.backend import fake, fused

_CHUNK_ELEMENTS = 2**18  # fp32 temporaries of a chunk of rows: 1 MiB, which stays in a core's cache


def softmax_stats(logits: Tensor, targets: Tensor) -> Tensor:
    """fp32 [4, tokens]: each row's maximum, sum of exp(logit - maximum), target's logit, sum of logits.

    logits: [tokens, vocabulary]; targets: int64 [tokens], columns; where there is no such column the target's logit
    is 0. The maximum passes NaN over, the sum of exponentials is NaN then; of no logits, or of -inf alone, the
    maximum is -inf and the sum of exponentials 0.
    """
    if op := fused("softmax_stats", logits):
        return op(logits, targets)
    stats = logits.new_zeros(4, len(targets), dtype=_wide(logits.dtype))
    if not logits.shape[1]:
        stats[0].fill_(-torch.inf)
        return stats
    for part in _row_chunks(logits):
        maximum, total, target, everything = stats[:, part]
        chunk = logits[part].to(stats.dtype, copy=True)
        target.copy_(_at(chunk, targets[part]))
        torch.sum(chunk, 1, out=everything)
        maximum.copy_(chunk.nan_to_num(-torch.inf, torch.inf, -torch.inf).amax(1))
        origin = maximum.masked_fill(maximum == -torch.inf, 0.0)  # -inf - -inf is no number
        torch.sum(chunk.sub_(origin[:, None]).exp_(), 1, out=total)
    return stats


def cross_entropy_backward_(
    logits: Tensor, targets: Tensor, maximum: Tensor, scale: Tensor, at_target: Tensor, shift: Tensor
) -> None:
    """Overwrite logits by scale * exp(logits - maximum) + shift, plus at_target at the targets.

    logits, targets: as in softmax_stats. The others: fp32 [tokens], maximum that of the whole row; where all of
    scale, at_target and shift are 0 the gradient is 0, whatever the logits are.
    """
    if op := fused("cross_entropy_backward_", logits):
        op(logits, targets, maximum, scale, at_target, shift)
        return
    if not logits.shape[1]:
        return
    counts = (scale != 0) | (at_target != 0) | (shift != 0)
    for part in _row_chunks(logits):
        chunk = logits[part].to(maximum.dtype, copy=True)
        chunk.sub_(maximum[part, None]).exp_().mul_(scale[part, None]).add_(shift[part, None])
        columns = targets[part]
        here = (columns >= 0) & (columns < logits.shape[1])
        chunk.scatter_add_(1, columns.where(here, 0)[:, None], at_target[part].where(here, 0.0)[:, None])
        logits[part] = chunk.masked_fill_(~counts[part, None], 0.0)


def _at(logits: Tensor, columns: Tensor) -> Tensor:
    here = (columns >= 0) & (columns < logits.shape[1])
    return logits.gather(1, columns.where(here, 0)[:, None])[:, 0].where(here, 0.0)


def _row_chunks(x: Tensor) -> Iterator[slice]:
    """Rows of x, [rows, columns], a few at a time on a CPU, all at once on a GPU."""
    rows = len(x) if x.is_cuda else max(1, _CHUNK_ELEMENTS // x.shape[1])
    return (slice(start, start + rows) for start in range(0, len(x), max(1, rows)))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


@fake("softmax_stats")
def _(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.new_empty((4, logits.shape[0]), dtype=_wide(logits.dtype))


@fake("cross_entropy_backward_")
def _(
    logits: Tensor, targets: Tensor, maximum: Tensor, scale: Tensor, at_target: Tensor, shift: Tensor
) -> None:
    return None
