"""Tokens are drawn from the distribution that transformers would draw from, exactly the same whatever the layout."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from llm3d.generate.sampling import Choice, Sampling, choose
from llm3d.kernels.counter_rng import uniform_number
from llm3d.parallel.layers import vocabulary_range
from llm3d.parallel.mesh import Mesh
from tests import pool
from tests.generate.drawing import CASES, SEEN, Case, drawn

NUMBERS = (torch.arange(500, dtype=torch.float64) + 0.5) / 500  # at which a row is drawn


def choose_on_rank(numbers: Tensor) -> dict[str, Choice]:
    """Of each case, each row at each number."""
    group = Mesh(tensor=torch.distributed.get_world_size()).tensor
    return {name: drawn(case, numbers, group) for name, case in CASES.items()}


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
        for row, found in enumerate(tokens.reshape(-1, count)):
            shares = found.bincount(minlength=case.vocab_size) / count
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


def drawn_from(logits: Tensor, samplings: list[Sampling], numbers: Tensor, bounds: list[int]) -> Choice:
    """On the rank that has the ids from its bound to the next."""
    group = Mesh(tensor=torch.distributed.get_world_size()).tensor
    first, last = bounds[group.rank() : group.rank() + 2]
    rows = logits[:, first:last].expand(len(numbers), -1)
    return choose(rows, first, group, samplings, numbers, [[]] * len(numbers))


def drawn_in_every_split(logits: Tensor, samplings: list[Sampling], numbers: Tensor) -> Choice:
    """By one rank, by two and four with parts of all sizes, the last of them none: the same everywhere."""
    size = logits.shape[1]
    splits = [[0, size], [0, size // 3, size], [0, 1, size], [0, size // 2, size - 1, size, size]]
    results = [
        choice
        for bounds in splits
        for choice in pool.run(drawn_from, len(bounds) - 1, logits, samplings, numbers, bounds)
    ]
    for choice in results:
        assert torch.equal(choice.tokens, results[0].tokens)
        torch.testing.assert_close(choice.log_probabilities, results[0].log_probabilities)
    return results[0]


def test_at_the_borders_of_their_intervals_the_same_tokens_are_drawn() -> None:
    """There, the last digit of a sum decides."""
    logits = 4 * torch.randn(1, 3001, generator=torch.Generator().manual_seed(2))
    sums = (logits - logits.max()).exp().cumsum(1, dtype=torch.float64)[0]
    numbers = (sums / sums[-1]).clamp(max=1 - 2**-32)
    tokens = drawn_in_every_split(logits, [Sampling()] * len(numbers), numbers).tokens
    assert len(tokens.unique()) > 500


def test_tokens_pass_a_chi_squared_test() -> None:
    """At the numbers that requests get, down to tokens of which one in a thousand draws is expected."""
    logits = 2.0 * torch.randn(1, 40, generator=torch.Generator().manual_seed(3))
    places = torch.arange(20_000)
    numbers = uniform_number(torch.full_like(places, 5), torch.zeros_like(places), places)
    tokens = drawn_in_every_split(logits, [Sampling(temperature=0.9)] * len(numbers), numbers).tokens
    expected = (logits.double() / 0.9).softmax(-1)[0] * len(numbers)
    often = expected > 20
    counted = tokens.bincount(minlength=40)[often]
    chi_squared = ((counted - expected[often]).square() / expected[often]).sum()
    assert often.sum() > 20 and chi_squared < 75, "at most 39 degrees of freedom, p > 4e-4"


def test_the_set_of_top_p_is_exact() -> None:
    """Where p ends within a token's share, however small, the set ends with that token."""
    logits = torch.linspace(-20, 0, 50)[None]  # the likeliest is the last
    shares = logits.double().softmax(-1)[0].flip(0)
    middles = shares.cumsum(0) - shares / 2
    samplings = [Sampling(top_p=p) for p in middles.tolist()]
    tokens = drawn_in_every_split(logits, samplings, torch.zeros(50, dtype=torch.float64)).tokens
    assert tokens.tolist() == list(range(49, -1, -1)), "number 0 draws the first in the set, the least likely"


def test_min_p_keeps_the_likeliest_token_and_its_equals() -> None:
    logits = torch.tensor([[1.0, 5.0, 2.0, 5.0, 4.9]])
    numbers = (torch.arange(8, dtype=torch.float64) + 0.5) / 8
    assert (
        drawn_in_every_split(logits, [Sampling(min_p=1.0)] * 8, numbers).tokens.tolist() == [1] * 4 + [3] * 4
    )


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-44, 1e-320])
def test_near_temperature_0_it_is_the_likeliest(temperature: float) -> None:
    logits = 30 * torch.randn(1, 101, generator=torch.Generator().manual_seed(4))
    sampling = Sampling(temperature, top_k=50, top_p=0.9, min_p=0.1)
    tokens, log_probabilities = drawn_in_every_split(logits, [sampling] * len(NUMBERS), NUMBERS)
    assert (tokens == logits.argmax()).all() and (log_probabilities == 0).all()


def test_a_large_vocabulary_of_equals_is_drawn_from_evenly() -> None:
    """Its weights add up to more than any other's."""
    size, numbers = 2**18, torch.tensor([0, 0.1, 0.7, 1 - 2**-32], dtype=torch.float64)
    for sampling in (Sampling(), Sampling(top_p=0.5)):  # of equals, top-p keeps all
        tokens = drawn_in_every_split(torch.full((1, size), 7.0), [sampling] * len(numbers), numbers).tokens
        assert torch.equal(tokens, (numbers * size).long())


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
