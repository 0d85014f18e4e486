"""Cross-entropy over a vocabulary that is spread over the tensor group; logits are never gathered."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.distributed import ProcessGroup

from llm3d.kernels.cross_entropy import cross_entropy_gradient_, softmax_stats
from llm3d.parallel.collectives import gather_rows


def cross_entropy_sum(logits: Tensor, targets: Tensor, first_id: int, group: ProcessGroup) -> Tensor:
    """Sum over tokens of -log softmax(logits)[target], an fp32 scalar, the same on all ranks of the group.

    logits: [tokens, vocabulary part], of the token ids from first_id on. OVERWRITTEN where a gradient is needed:
        with exponentials, and in backward with the gradient, so that a second such tensor never exists.
    targets: int64 [tokens], global ids; negative ones are ignored.
    Of each token a rank sends 12 bytes: its maximum, its sum of exponentials, its logit of the target. Backward
    communicates nothing. Shoeybi et al. 2019, section 3.
    """
    return _CrossEntropy.apply(logits, targets, first_id, group)


class _CrossEntropy(Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, first_id: int, group: ProcessGroup) -> Tensor:
        local = targets - first_id
        local = local.masked_fill((local < 0) | (local >= logits.shape[1]), -1)  # -1: not in this rank's part
        stats = softmax_stats(logits, local, keep_exponentials=ctx.needs_input_grad[0])
        maximum, total, target = stats
        rescale = torch.ones_like(maximum)
        if group.size() > 1:
            everyone = gather_rows(stats[None], group)[0]  # [n, 3, tokens]
            maximum, target = everyone[:, 0].amax(0), everyone[:, 2].sum(0)
            total = (everyone[:, 1] * (everyone[:, 0] - maximum).exp()).sum(0)
            rescale = (stats[0] - maximum).exp()
        counts = targets >= 0
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(logits, local, counts, torch.where(counts, rescale / total, 0.0))
        return torch.where(counts, total.log() + (maximum - target), 0.0).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        exponentials, local, counts, factor = ctx.saved_tensors
        gradient = cross_entropy_gradient_(exponentials, local, factor * grads[0], counts * grads[0])
        return gradient, None, None, None
