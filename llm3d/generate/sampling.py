"""The next token of each sequence, chosen from logits whose vocabulary is spread over the tensor group.

A token is drawn by inverting the distribution's cumulative sum, in the order of the vocabulary, at a number that is a
function of the request's seed and the token's place alone: the same under every layout and in every batch. What is
summed are whole numbers, 2^40 times each token's probability over the likeliest one's: their sums are exact in any
order, so that no split of the vocabulary over ranks changes a draw or a top-p set, and a GPU, which adds up floats in
an order that changes from run to run, draws what a CPU draws. A rank sends a few numbers a sequence; only for top-k
and top-p it sends its likeliest logits, never all that it can avoid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from llm3d.parallel.collectives import all_reduce_max, all_reduce_sum, gather_rows, is_alone

_FIRST_CANDIDATES = 64  # of each rank, for top-p; four times as many until they hold what is asked
_UNIT = 2**40  # the weight of the likeliest token; those of 2^22 tokens add up to less than 2^63


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. temperature 0: the likeliest token, always.

    The others leave tokens out, in this order, each of what is left: all but the top_k likeliest (0: none); all but
    the fewest likeliest that together have top_p of the probability (Holtzman et al. 2020); those below min_p times
    the likeliest one's probability (Nguyen et al. 2024).
    repetition_penalty: of tokens that were there before, positive logits are divided and negative ones multiplied by
    it. Keskar et al. 2019.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


class Choice(NamedTuple):
    """The same on all ranks of the tensor group."""

    tokens: Tensor  # int64 [sequences]
    # fp32 [sequences], of the model at the temperature, before anything is left out
    log_probabilities: Tensor


class _Settings(NamedTuple):
    """Of each row of logits, fp64 [rows, 1] on their device."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    penalty: Tensor


def choose(
    logits: Tensor,
    first_id: int,
    group: ProcessGroup,
    samplings: Sequence[Sampling],
    numbers: Tensor,
    seen: Sequence[Sequence[int]],
) -> Choice:
    """logits: [rows, vocabulary part], of the token ids from first_id on.

    numbers: fp64 [rows], in [0, 1 - 2^-32], which decide.  seen: of each row, the tokens that count as repeated.
    """
    settings = _settings(samplings, logits.device)
    if not logits.shape[1]:  # a rank beyond a small vocabulary
        logits = logits.new_full((len(logits), 1), -math.inf)
    logits = logits.float()
    scores = _scores(logits, settings, group)
    totals = all_reduce_sum(scores.exp().sum(1, keepdim=True), group)
    penalized = scores
    if any(s.repetition_penalty != 1 for s in samplings):
        penalized = _scores(_penalise(logits, first_id, settings.penalty, seen), settings, group)
    tokens = _likeliest(penalized, first_id, group)
    if any(s.temperature for s in samplings):
        allowed = _allowed(penalized, settings, samplings, group)
        drawn = _draw(penalized, allowed, first_id, group, numbers)
        tokens = torch.where(settings.temperature[:, 0] > 0, drawn, tokens)
    local = (tokens - first_id)[:, None]
    mine = (local >= 0) & (local < scores.shape[1])
    score = scores.gather(1, local.clamp(0, scores.shape[1] - 1)).where(mine, 0.0)
    score = all_reduce_sum(score, group)
    return Choice(tokens, (score - totals.log())[:, 0])


def _settings(samplings: Sequence[Sampling], device: torch.device) -> _Settings:
    rows = [(s.temperature, s.top_k, s.top_p, s.min_p, s.repetition_penalty) for s in samplings]
    columns = torch.tensor(rows, dtype=torch.float64).to(device, non_blocking=True)
    return _Settings(*columns.t()[:, :, None].unbind())


def _scores(logits: Tensor, settings: _Settings, group: ProcessGroup) -> Tensor:
    """fp32, shaped like logits: at the temperature, how far each is below the row's largest, whose score is 0.

    The difference is taken before it is divided: near temperature 0 it goes to -inf, and no score to NaN.
    """
    maxima = all_reduce_max(logits.amax(1, keepdim=True), group)
    temperature = settings.temperature.where(settings.temperature > 0, 1.0)
    return (logits - maxima) / temperature.clamp(min=torch.finfo(torch.float32).tiny).float()


def _weights(scores: Tensor) -> Tensor:
    """int64: what a token's probability is proportional to, exactly from here on; 0 below half of 2^-40."""
    return scores.exp().mul_(_UNIT).round_().long()


def _penalise(logits: Tensor, first_id: int, penalty: Tensor, seen: Sequence[Sequence[int]]) -> Tensor:
    repeated, penalty = torch.zeros(logits.shape, dtype=torch.bool), penalty.float()
    for row, tokens in zip(repeated, seen, strict=True):
        local = torch.tensor(tokens, dtype=torch.int64) - first_id
        row[local[(local >= 0) & (local < len(row))]] = True
    changed = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(repeated.to(logits.device), changed, logits)


def _likeliest(scores: Tensor, first_id: int, group: ProcessGroup) -> Tensor:
    """int64 [rows]; of equals the one with the lowest id."""
    at = scores.argmax(1, keepdim=True)
    best = torch.stack([scores.gather(1, at)[:, 0].double(), (at[:, 0] + first_id).double()])
    everyones = best[None] if is_alone(group) else gather_rows(best[None], group)[0]
    scores_of_ranks, ids = everyones.unbind(1)
    return ids.gather(0, scores_of_ranks.argmax(0, keepdim=True))[0].long()


# ---- what is left out ----


def _allowed(
    scores: Tensor, settings: _Settings, samplings: Sequence[Sampling], group: ProcessGroup
) -> Tensor | None:
    """The least score that is not left out, [rows, 1]; None where nothing is."""
    cuts = []
    if any(s.top_k or s.top_p < 1 for s in samplings):
        cuts.append(_least_candidates(scores, settings, max(s.top_k for s in samplings), group))
    if any(s.min_p for s in samplings):
        cuts.append(settings.min_p.log().float())
    return torch.stack(cuts).amax(0) if cuts else None


def _least_candidates(scores: Tensor, settings: _Settings, top_k: int, group: ProcessGroup) -> Tensor:
    """The least score within top_k and top_p; -inf in rows that ask for neither."""
    totals = all_reduce_sum(_weights(scores).sum(1, keepdim=True), group)
    k = settings.top_k.where(settings.top_k > 0, math.inf)
    width = _widest(scores, group)
    count = max(top_k + 1, _FIRST_CANDIDATES if bool((settings.top_p < 1).any()) else 0)
    while True:
        count = min(count, width)
        candidates, complete = _best_of_ranks(scores, count, group)
        within_k = torch.arange(candidates.shape[1], device=candidates.device) < k
        mass = _weights(candidates).masked_fill(~within_k, 0)
        of_all = mass.sum(1, keepdim=True).where(settings.top_k > 0, totals)
        above = mass.cumsum(1) - mass  # of the likelier ones
        kept = within_k & ((above < settings.top_p * of_all) | (settings.top_p >= 1))
        least = candidates.masked_fill(~kept, math.inf).amin(1, keepdim=True)
        unlimited = (settings.top_k == 0) & (settings.top_p >= 1)
        if count == width or bool(((least > complete) | unlimited).all()):
            return least.masked_fill(unlimited, -math.inf)
        count *= 4


def _best_of_ranks(scores: Tensor, count: int, group: ProcessGroup) -> tuple[Tensor, Tensor]:
    """The largest `count` scores of each rank, [rows, n * count], largest first; and above what none is missing."""
    best = scores.topk(min(count, scores.shape[1]), dim=1).values
    last = best[:, -1:] if best.shape[1] < scores.shape[1] else torch.full_like(best[:, -1:], -math.inf)
    best = torch.nn.functional.pad(best, (0, count - best.shape[1]), value=-math.inf)
    if not is_alone(group):
        best = gather_rows(best[None], group)[0].transpose(0, 1).flatten(1).sort(1, descending=True).values
    return best, all_reduce_max(last.clone(), group)


def _widest(scores: Tensor, group: ProcessGroup) -> int:
    width = torch.tensor(scores.shape[1], device=scores.device)
    return int(all_reduce_max(width, group))


# ---- the draw ----


def _draw(
    scores: Tensor, allowed: Tensor | None, first_id: int, group: ProcessGroup, numbers: Tensor
) -> Tensor:
    """int64 [rows]: the token at whose interval of the cumulative sum the row's number falls."""
    weights = _weights(scores)
    if allowed is not None:
        weights = weights.masked_fill(scores < allowed, 0)
    ends = weights.cumsum(1)
    mine = ends[:, -1]
    totals = mine[None] if is_alone(group) else gather_rows(mine[None], group)[0]  # [n, rows]
    ends_of_ranks = totals.cumsum(0)
    targets = (numbers.to(scores.device) * ends_of_ranks[-1]).long()
    targets -= ends_of_ranks[group.rank()] - mine  # counted from where this rank's part starts
    at = torch.searchsorted(ends, targets[:, None], right=True)[:, 0]
    return all_reduce_sum(torch.where((targets >= 0) & (targets < mine), at + first_id, 0), group)
