"""Log-probabilities and cross-entropy over a vocabulary that is spread over the tensor group.

Logits are never gathered, and no fp32 tensor of their size ever exists. What losses are made of comes out a number
a token, `TokenTerms`; any loss over those is plain autograd on [tokens].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.autograd.graph import increment_version
from torch.distributed import ProcessGroup

from llm3d.kernels.cross_entropy import cross_entropy_backward_, softmax_stats
from llm3d.kernels.linear import linear, linear_input_gradient
from llm3d.parallel.boxes import ShardedParameter
from llm3d.parallel.collectives import gather_rows, is_alone, scatter_sum_rows
from llm3d.parallel.layers import add_linear_gradient

# Of logits that exist at once. With bf16 and 128,256 token ids 2,048 tokens: enough that a GPU reads and writes the
# head's fp32 gradient, as it does with each chunk, in a tenth of the time of the chunk's products.
_CHUNK_BYTES = 512 * 2**20
_ROWS = 128  # a chunk's tokens are a multiple of it where they can be: the rows of a GPU's tile of a product


class TokenTerms(NamedTuple):
    """fp32 [tokens] each, the same on all ranks of the group; all but below_maximum are differentiable."""

    log_probabilities: Tensor  # log softmax(logits)[target]; 0 where the target is negative
    log_normalizer: Tensor  # log sum exp(logits)
    sum_of_logits: Tensor
    below_maximum: (
        Tensor  # the row's largest logit minus the target's: 0 where the target is the likeliest token
    )
    entropy: Callable[[], Tensor] | None = None  # of each token's distribution, computed when it is asked for

    def spread(self, places: Tensor, num_tokens: int) -> TokenTerms:
        """These as terms of more tokens, of which the others' are 0. places: int64 [tokens], theirs among them."""

        def among_all(x: Tensor) -> Tensor:
            return x.new_zeros(num_tokens).index_copy(0, places, x)

        log_p, normalizer, total, below, entropy = self
        return TokenTerms(
            among_all(log_p),
            among_all(normalizer),
            among_all(total),
            among_all(below),
            entropy and (lambda: among_all(entropy())),
        )


def cross_entropy_sum(
    terms: TokenTerms,
    targets: Tensor,
    vocab_size: int,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Sum over the tokens whose target is not negative, an fp32 scalar.

    Of each: -(1 - s) log p(target) - s * mean over the whole vocabulary of log p, with s = label_smoothing
    (Szegedy et al. 2016), + z_loss * log_normalizer^2 (Chowdhery et al. 2022, section 5).
    """
    counted = targets >= 0
    log_normalizer = torch.where(counted, terms.log_normalizer, 0.0)  # before the square: NaN times 0 is NaN
    loss = -terms.log_probabilities
    if label_smoothing:
        mean_log_probability = terms.sum_of_logits / vocab_size - log_normalizer
        loss = (1 - label_smoothing) * loss - label_smoothing * mean_log_probability
    if z_loss:
        loss = loss + z_loss * log_normalizer.square()
    return torch.where(counted, loss, 0.0).sum()


def token_terms(logits: Tensor, targets: Tensor, first_id: int, group: ProcessGroup) -> TokenTerms:
    """logits: [tokens, vocabulary part], of the token ids from first_id on; targets: int64 [tokens], global ids.

    The logits are OVERWRITTEN by their gradient in backward, so that a second such tensor never exists.
    Of each token a rank sends 16 bytes. Backward communicates nothing. Shoeybi et al. 2019, section 3.
    """
    return TokenTerms(*_OfLogits.apply(logits, targets, first_id, group))


def token_terms_of_hidden(
    hidden: Tensor,
    weight: ShardedParameter,
    targets: Tensor,
    first_id: int,
    group: ProcessGroup,
    sequence_parallel: bool = False,
) -> TokenTerms:
    """As token_terms(hidden @ weight^T, ...), a chunk of tokens at a time, forward and again in backward.

    hidden: [tokens, hidden], or this rank's [tokens / n, hidden] under sequence parallelism; weight: [vocabulary part,
    hidden]. Costs the projection a second time and saves the logits. Communicates as column_parallel_linear and
    token_terms do.
    """
    return TokenTerms(*_OfHidden.apply(hidden, weight, targets, first_id, group, sequence_parallel))


def fits_one_chunk(num_tokens: int, weight: Tensor) -> bool:
    """Whether the logits of so many tokens exist at once anyway, so that they may be kept for backward as well."""
    return num_tokens <= _rows_a_chunk(weight)


def entropy_of_logits(logits: Tensor, group: ProcessGroup) -> Tensor:
    """fp32 [tokens]: the entropy of softmax(logits), in nats, the same on all ranks of the group.

    logits: [tokens, vocabulary part]. Where `token_terms` is made of the same, call this after it: backward then reads
    them here before it overwrites them there. Of each token a rank sends 20 bytes. Backward communicates nothing.
    """
    return _Entropy.apply(logits, group)


def entropy_of_hidden(
    hidden: Tensor, weight: ShardedParameter, group: ProcessGroup, sequence_parallel: bool = False
) -> Tensor:
    """As entropy_of_logits(hidden @ weight^T, ...), a chunk of tokens at a time, forward and again in backward.

    Call this after token_terms_of_hidden of the same weight, whose backward then comes last and says that the weight's
    gradient is complete.
    """
    return _EntropyOfHidden.apply(hidden, weight, group, sequence_parallel)


class _Entropy(Function):
    """H = log_normalizer - m, m = sum p logit; dH / d logit = -p (logit - m)."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, group: ProcessGroup) -> Tensor:
        entropy, *kept = _entropy(_entropy_stats(logits), group)
        ctx.save_for_backward(logits, *kept)
        return entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,), (logits, *kept) = grads, ctx.saved_tensors
        return _entropy_gradient(grad, logits, *kept), None


class _EntropyOfHidden(Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: ShardedParameter, group: ProcessGroup, sequence: bool
    ) -> Tensor:
        ctx.weight, ctx.group, ctx.sequence = weight, group, sequence and not is_alone(group)
        x = gather_rows(hidden, group)[0] if ctx.sequence else hidden
        stats = [_entropy_stats(linear(x[part], weight)) for part in _chunks(x, weight)]
        entropy, *kept = _entropy(torch.cat(stats, dim=1), group)
        ctx.save_for_backward(hidden, *kept)
        return entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,), (hidden, *kept), weight = grads, ctx.saved_tensors, ctx.weight
        x = gather_rows(hidden, ctx.group)[0] if ctx.sequence else hidden
        gradient = torch.empty_like(x)
        for part in _chunks(x, weight):
            logits = linear(x[part], weight)
            grad_logits = _entropy_gradient(grad[part], logits, *(k[part] for k in kept))
            linear_input_gradient(grad_logits, weight, out=gradient[part])
            if ctx.needs_input_grad[1]:
                add_linear_gradient(weight, grad_logits, x[part])
        return _summed(gradient, ctx.group, ctx.sequence), None, None, None


def _entropy_stats(logits: Tensor) -> Tensor:
    """fp32 [5, tokens]: softmax_stats of no targets, and each row's sum of exp(logit - maximum) logit."""
    stats = softmax_stats(logits, torch.full((len(logits),), -1, dtype=torch.int64, device=logits.device))
    sums = [(_exponentials(logits[part], stats[0, part]) * logits[part]).sum(1) for part in _rows(logits)]
    return torch.cat([stats, torch.cat(sums)[None]])


def _entropy(stats: Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From _entropy_stats on each rank: the entropy; maximum, sum of exponentials and m of whole rows."""
    nowhere = torch.full((stats.shape[1],), -1, dtype=torch.int64, device=stats.device)
    terms, maximum, total = _softmax(stats[:4], nowhere, group)
    mean = stats[4] * (stats[0] - maximum).exp_() / total
    if not is_alone(group):
        dist.all_reduce(mean, group=group)
    return terms.log_normalizer - mean, maximum, total, mean


def _entropy_gradient(grad: Tensor, logits: Tensor, maximum: Tensor, total: Tensor, mean: Tensor) -> Tensor:
    gradient = torch.empty_like(logits)
    for part in _rows(logits):
        p = _exponentials(logits[part], maximum[part]).div_(total[part, None])
        gradient[part] = p.mul_(logits[part] - mean[part, None]).mul_(-grad[part, None])
    return gradient


def _exponentials(logits: Tensor, maximum: Tensor) -> Tensor:
    """fp32: exp(logit - maximum)."""
    return (logits.float() - maximum[:, None]).exp_()


def _rows(logits: Tensor) -> Iterator[slice]:
    """Tokens, so many at a time that fp32 copies of their logits are small."""
    rows = max(1, _CHUNK_BYTES // (4 * max(1, logits.shape[1])))
    return (slice(start, start + rows) for start in range(0, max(1, len(logits)), rows))


class _OfLogits(Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, first_id: int, group: ProcessGroup
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        local = targets - first_id
        terms, maximum, total = _softmax(softmax_stats(logits, local), targets, group)
        ctx.save_for_backward(logits, targets, local, maximum, total)
        ctx.mark_non_differentiable(terms.below_maximum)
        return terms[:4]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor, None, None, None]:
        logits, targets, local, maximum, total = ctx.saved_tensors
        gradient = logits.detach()
        cross_entropy_backward_(gradient, local, maximum, *_factors(total, targets, *grads[:3]))
        increment_version(gradient)  # a second backward then finds that what it needs is gone
        return gradient, None, None, None


class _OfHidden(Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: ShardedParameter,
        targets: Tensor,
        first_id: int,
        group: ProcessGroup,
        sequence: bool,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.weight, ctx.group, ctx.sequence = weight, group, sequence and not is_alone(group)
        local = targets - first_id
        x = gather_rows(hidden, group)[0] if ctx.sequence else hidden
        stats = [softmax_stats(linear(x[part], weight), local[part]) for part in _chunks(x, weight)]
        terms, maximum, total = _softmax(torch.cat(stats, dim=1), targets, group)
        ctx.save_for_backward(hidden, targets, local, maximum, total)
        ctx.mark_non_differentiable(terms.below_maximum)
        return terms[:4]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor, None, None, None, None, None]:
        hidden, targets, local, maximum, total = ctx.saved_tensors
        weight, group = ctx.weight, ctx.group
        factors = _factors(total, targets, *grads[:3])
        x = gather_rows(hidden, group)[0] if ctx.sequence else hidden
        gradient = torch.empty_like(x)
        for part in _chunks(x, weight):
            logits = linear(x[part], weight)
            cross_entropy_backward_(logits, local[part], maximum[part], *(f[part] for f in factors))
            linear_input_gradient(logits, weight, out=gradient[part])
            if ctx.needs_input_grad[1]:
                add_linear_gradient(weight, logits, x[part])
        if ctx.needs_input_grad[1]:
            weight.accumulated()
        return _summed(gradient, group, ctx.sequence), None, None, None, None, None


def _summed(gradient: Tensor, group: ProcessGroup, sequence: bool) -> Tensor:
    """Of the partial sums over the group this rank's tokens', under sequence parallelism, or all."""
    if sequence:
        return scatter_sum_rows(gradient, group)
    if not is_alone(group):
        dist.all_reduce(gradient, group=group)
    return gradient


def _softmax(stats: Tensor, targets: Tensor, group: ProcessGroup) -> tuple[TokenTerms, Tensor, Tensor]:
    """From [4, tokens] of softmax_stats on each rank: the terms, and maximum and sum of exponentials of whole rows."""
    maximum, total, target, sum_of_logits = stats.unbind()
    if not is_alone(group):
        everyone = gather_rows(stats[None], group)[0]  # [n, 4, tokens]
        maximum = everyone[:, 0].amax(0)
        total = (everyone[:, 1] * (everyone[:, 0] - maximum).exp()).sum(0)
        target, sum_of_logits = everyone[:, 2:].sum(0)
    log_total = total.log()
    # The difference comes first: it is exact where the target's logit is the maximum.
    log_probabilities = torch.where(targets >= 0, (target - maximum) - log_total, 0.0)
    terms = TokenTerms(log_probabilities, maximum + log_total, sum_of_logits.clone(), maximum - target)
    return terms, maximum, total


def _factors(
    total: Tensor,
    targets: Tensor,
    grad_log_probabilities: Tensor | None,
    grad_log_normalizer: Tensor | None,
    grad_sum: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """scale, at_target and shift of cross_entropy_backward_: with p = exp(logit - maximum) / total,

    d log p(target) = (1 at the target) - p and d log_normalizer = p.
    """
    nothing = torch.zeros_like(total)
    at_target = nothing
    if grad_log_probabilities is not None:
        at_target = torch.where(targets >= 0, grad_log_probabilities, 0.0)
    of_p = (nothing if grad_log_normalizer is None else grad_log_normalizer) - at_target
    scale = torch.where(of_p == 0, 0.0, of_p / total)  # of an ignored token, whose total may be NaN, nothing
    return scale, at_target, nothing if grad_sum is None else grad_sum.contiguous()


def _chunks(x: Tensor, weight: Tensor) -> Iterator[slice]:
    """Tokens of x, [tokens, hidden], so many at a time as _rows_a_chunk says."""
    rows = _rows_a_chunk(weight)
    return (slice(start, start + rows) for start in range(0, max(1, len(x)), rows))


def _rows_a_chunk(weight: Tensor) -> int:
    """Tokens whose logits fit _CHUNK_BYTES."""
    rows = _CHUNK_BYTES // max(1, len(weight) * weight.element_size())
    return rows // _ROWS * _ROWS if rows > _ROWS else max(1, rows)
