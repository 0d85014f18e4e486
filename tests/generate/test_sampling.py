"""Tokens are drawn from the distribution that transformers would draw from, whatever the layout."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from llm3d.generate.sampling import Choice, Sampling, choose
from llm3d.kernels.noise import uniform_number
from llm3d.parallel.layers import vocabulary_range
from llm3d.parallel.mesh import Mesh
from tests import pool

NUMBERS = (torch.arange(500, dtype=torch.float64) + 0.5) / 500  # at which a row is drawn


@dataclass(frozen=True)
class Case:
    sampling: Sampling
    vocab_size: int = 101
    scale: float = 3.0  # of the logits

    def logits(self) -> Tensor:
        return self.scale * torch.randn(3, self.vocab_size, generator=torch.Generator().manual_seed(0))


SEEN = [[1, 5, 5, 0], [], [4, 3]]
CASES = {
    "plain": Case(Sampling()),
    "hot": Case(Sampling(temperature=1.7)),
    "top-k": Case(Sampling(top_k=7)),
    "top-k beyond a rank's part": Case(Sampling(top_k=60, temperature=0.5)),
    "top-k of one": Case(Sampling(top_k=1)),
    "top-k beyond all": Case(Sampling(top_k=500)),
    "top-p": Case(Sampling(top_p=0.8)),
    "top-p of many": Case(Sampling(top_p=0.9), vocab_size=2003, scale=0.1),
    "top-p of almost nothing": Case(Sampling(top_p=1e-6)),
    "min-p": Case(Sampling(min_p=0.2)),
    "penalty": Case(Sampling(repetition_penalty=1.8)),
    "all": Case(Sampling(0.7, top_k=30, top_p=0.9, min_p=0.05, repetition_penalty=0.6)),
    "fewer tokens than ranks": Case(Sampling(top_k=2), vocab_size=5),
}


def choose_on_rank(numbers: Tensor) -> dict[str, Choice]:
    """Of each case, each row at each number."""
    group = Mesh(tensor=torch.distributed.get_world_size()).tensor
    return {name: drawn(case, numbers, group) for name, case in CASES.items()}


def drawn(case: Case, numbers: Tensor, group: ProcessGroup) -> Choice:
    logits, count = case.logits(), len(numbers)
    part = vocabulary_range(case.vocab_size, group)
    rows = logits[:, part.start : part.stop].repeat_interleave(count, 0)
    seen = [tokens for tokens in SEEN for _ in range(count)]
    return choose(rows, part.start, group, [case.sampling] * len(rows), numbers.repeat(len(logits)), seen)


def of_transformers(case: Case) -> Tensor:
    """Probabilities, [rows, vocabulary]."""
    from transformers import generation as hf

    s, scores = case.sampling, case.logits()
    for row, tokens in enumerate(SEEN):
        if tokens and s.repetition_penalty != 1:
            processor = hf.RepetitionPenaltyLogitsProcessor(s.repetition_penalty)
            scores[row : row + 1] = processor(torch.tensor([tokens]), scores[row : row + 1])
    warpers = [hf.TemperatureLogitsWarper(s.temperature)]
    warpers += [hf.TopKLogitsWarper(s.top_k)] if s.top_k else []
    warpers += [hf.TopPLogitsWarper(s.top_p)] if s.top_p < 1 else []
    warpers += [hf.MinPLogitsWarper(s.min_p)] if s.min_p else []
    for warper in warpers:
        scores = warper(None, scores)
    return scores.double().softmax(-1)


@functools.cache
def drawn_by_all() -> list[dict[str, Choice]]:
    """By every rank of every layout."""
    return [result for n in (1, 2, 4) for result in pool.run(choose_on_rank, n, NUMBERS)]


@pytest.mark.parametrize("name", CASES)
def test_tokens_come_as_often_as_they_are_likely(name: str) -> None:
    """At evenly spread numbers, each token as often as its probability says, to within one."""
    case, count = CASES[name], len(NUMBERS)
    expected = of_transformers(case)
    results = [result[name] for result in drawn_by_all()]
    for tokens, log_probabilities in results:
        for row, drawn in enumerate(tokens.reshape(-1, count)):
            shares = drawn.bincount(minlength=case.vocab_size) / count
            assert (shares - expected[row]).abs().max() < 1.001 / count
            assert not shares[expected[row] == 0].any()
        of_model = (case.logits() / case.sampling.temperature).log_softmax(-1).repeat_interleave(count, 0)
        torch.testing.assert_close(log_probabilities, of_model.gather(1, tokens[:, None])[:, 0])
        assert torch.equal(tokens, results[0].tokens), "every rank of every layout draws the same"


def greedy_on_rank(logits: Tensor) -> Choice:
    group = Mesh(tensor=torch.distributed.get_world_size()).tensor
    part = vocabulary_range(logits.shape[1], group)
    rows = len(logits)
    samplings = [Sampling(temperature=0, top_k=3)] * (rows - 1) + [Sampling()]  # the last row is drawn
    numbers = torch.full((rows,), 1 - 2**-32, dtype=torch.float64)
    return choose(logits[:, part.start : part.stop], part.start, group, samplings, numbers, [[]] * rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_temperature_0_it_is_the_first_of_the_likeliest(dtype: torch.dtype) -> None:
    logits = torch.randn(6, 37, generator=torch.Generator().manual_seed(1)).to(dtype)
    logits[1, [9, 30]] = 5.0
    logits[2, [36, 35]] = 5.0
    for n in (1, 2, 4):
        for tokens, log_probabilities in pool.run(greedy_on_rank, n, logits):
            assert tokens[:-1].tolist() == logits.argmax(-1)[:-1].tolist()
            assert tokens[-1] == 36, "the largest number draws the last token"
            expected = logits.float().log_softmax(-1).gather(1, tokens[:, None])[:, 0]
            torch.testing.assert_close(log_probabilities, expected)


def test_numbers_are_spread_evenly_and_depend_on_every_part() -> None:
    seeds, replies, places = torch.meshgrid(
        torch.arange(20), torch.arange(8), torch.arange(200), indexing="ij"
    )
    numbers = uniform_number(seeds.flatten(), replies.flatten(), places.flatten())
    assert len(numbers.unique()) == len(numbers)
    counts = torch.histc(numbers.float(), 64, 0, 1)
    expected = len(numbers) / 64
    assert ((counts - expected).square() / expected).sum() < 110, (
        "chi-squared, 63 degrees of freedom, p > 2e-4"
    )
    assert torch.equal(numbers, uniform_number(seeds.flatten(), replies.flatten(), places.flatten()))
    assert numbers.min() >= 0 and numbers.max() <= 1 - 2**-32
