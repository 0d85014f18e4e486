"""The two passes over the logits that cross-entropy makes, for one part of the vocabulary."""

from __future__ import annotations

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
    rows = len(logits) if logits.is_cuda else max(1, _CHUNK_ELEMENTS // logits.shape[1])
    for start in range(0, len(logits), rows):
        chunk, columns = logits[start : start + rows], targets[start : start + rows]
        maximum, total, target = stats[:, start : start + rows]
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
    if exponentials.shape[1]:
        exponentials.mul_(scale.to(exponentials.dtype)[:, None])
        at_target = torch.where(targets >= 0, -weight, 0.0).to(exponentials.dtype)
        rows = torch.arange(len(targets), device=targets.device)
        exponentials[rows, targets.clamp(min=0)] += at_target
    return exponentials
