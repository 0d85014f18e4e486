"""The two passes over the logits that cross-entropy makes, for one part of the vocabulary."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_CHUNK_ELEMENTS = 2**18  # fp32 temporaries of a chunk of rows: 1 MiB, which stays in a core's cache


def softmax_stats(logits: Tensor, targets: Tensor, keep_exponentials: bool) -> Tensor:
    """fp32 [3, tokens]: each row's maximum, its sum of exp(logit - maximum), its target's logit.

    logits: [tokens, vocabulary]; with keep_exponentials overwritten by exp(logits - maximum).
    targets: int64 [tokens], columns; where negative, the target's logit is 0.
    """
    stats = logits.new_zeros(3, len(targets), dtype=torch.float32)
    if not logits.shape[1]:
        stats[0].fill_(-torch.inf)
        return stats
    for part in _row_chunks(logits):
        chunk, columns = logits[part], targets[part]
        maximum, total, target = stats[:, part]
        maximum.copy_(chunk.amax(1))
        target.copy_(chunk.gather(1, columns.clamp(min=0)[:, None])[:, 0]).mul_(columns >= 0)
        exponentials = torch.sub(chunk, maximum[:, None]).exp_()
        torch.sum(exponentials, 1, out=total)
        if keep_exponentials:
            chunk.copy_(exponentials)
    return stats


def cross_entropy_gradient_(exponentials: Tensor, targets: Tensor, scale: Tensor, weight: Tensor) -> Tensor:
    """Overwrite exponentials by exponentials * scale, minus weight at the targets; -> the same tensor.

    exponentials: [tokens, vocabulary]. scale, weight: fp32 [tokens]. targets: as in softmax_stats.
    """
    if not exponentials.shape[1]:
        return exponentials
    at = torch.arange(len(targets), device=targets.device), targets.clamp(min=0)
    # In fp32, for where the model is sure of the target the two terms cancel.
    at_target = exponentials[at].float() * scale - torch.where(targets >= 0, weight, 0.0)
    for chunk in _row_chunks(exponentials):
        exponentials[chunk].mul_(scale[chunk, None])
    exponentials[at] = at_target.to(exponentials.dtype)
    return exponentials


def _row_chunks(x: Tensor) -> Iterator[slice]:
    """Rows of x, [rows, columns], a few at a time on a CPU, all at once on a GPU."""
    rows = len(x) if x.is_cuda else max(1, _CHUNK_ELEMENTS // x.shape[1])
    return (slice(start, start + rows) for start in range(0, len(x), rows))
