"""The passes of cross-entropy over one part of the vocabulary; put together in tests/parallel."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llm3d.kernels import cross_entropy
from llm3d.kernels.cross_entropy import cross_entropy_backward_, softmax_stats
from tests.kernels.exactness import assert_close, randn
from tests.kernels.references import targets_of

SHAPES = [(1, 1), (1, 13), (17, 5), (31, 97), (3, 8003), (2, 33000)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_statistics_are_those_of_fp64(shape: tuple[int, int], dtype: torch.dtype) -> None:
    exact, targets = randn(*shape, scale=5.0), targets_of(*shape)
    logits = exact.to(dtype)
    maximum, total, target, everything = softmax_stats(logits, targets)
    assert torch.equal(logits, exact.to(dtype)), "the logits are kept"
    assert torch.equal(maximum.double(), exact.amax(1))
    assert_close(total, (exact - exact.amax(1, keepdim=True)).exp().sum(1))
    here = (targets >= 0) & (targets < shape[1])
    at_target = exact.gather(1, targets.where(here, 0)[:, None])[:, 0]
    assert torch.equal(target.double(), torch.where(here, at_target, 0.0))
    assert torch.allclose(everything.double(), exact.sum(1), atol=1e-5 * float(exact.abs().sum(1).amax()))


@pytest.mark.parametrize("chunk_elements", [1, 40])
def test_the_reference_does_not_depend_on_its_chunks(
    chunk_elements: int, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, targets = randn(31, 97).float(), targets_of(31, 97)
    expected = softmax_stats(logits, targets)
    monkeypatch.setattr(cross_entropy, "_CHUNK_ELEMENTS", chunk_elements)
    assert torch.equal(softmax_stats(logits, targets), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_gradient_is_what_it_says(shape: tuple[int, int], dtype: torch.dtype) -> None:
    exact, targets = randn(*shape, scale=3.0).to(dtype).double(), targets_of(*shape)
    maximum, scale, at_target, shift = randn(4, shape[0], seed=1)
    maximum = exact.amax(1) + maximum.abs()
    scale[0] = at_target[0] = shift[0] = 0.0
    expected = scale[:, None] * (exact - maximum[:, None]).exp() + shift[:, None]
    for row, column in enumerate(targets.tolist()):
        if 0 <= column < shape[1]:
            expected[row, column] += at_target[row]
    wide = torch.promote_types(dtype, torch.float32)
    logits = exact.to(dtype)
    factors = [factor.to(wide) for factor in (maximum, scale, at_target, shift)]
    cross_entropy_backward_(logits, targets, *factors)
    assert logits.dtype == dtype
    assert_close(logits, expected, 2e-6 if dtype != torch.bfloat16 else 2**-8)


def test_a_part_without_columns_adds_nothing() -> None:
    logits, targets = torch.empty(3, 0), torch.full((3,), -1)
    assert softmax_stats(logits, targets).tolist() == [[-torch.inf] * 3, [0.0] * 3, [0.0] * 3, [0.0] * 3]
    cross_entropy_backward_(logits, targets, *torch.ones(4, 3))
    assert logits.shape == (3, 0)


def test_no_tokens_are_no_work() -> None:
    logits, targets = torch.empty(0, 7), torch.empty(0, dtype=torch.int64)
    assert softmax_stats(logits, targets).shape == (4, 0)
    cross_entropy_backward_(logits, targets, *torch.ones(4, 0))


def test_logits_that_are_no_numbers_are_carried_along() -> None:
    inf, nan = torch.inf, torch.nan
    rows = [[1.0, -inf, 2.0], [-inf, -inf, -inf], [1.0, nan, 2.0], [nan, nan, nan], [1.0, inf, 2.0]]
    logits, targets = torch.tensor(rows), torch.tensor([0, 0, 0, 0, 0])
    maximum, total, _, _ = softmax_stats(logits, targets)
    assert maximum.tolist() == [2.0, -inf, 2.0, -inf, inf]
    assert total[:2].tolist() == pytest.approx([1 + 2.718281828**-1, 0.0])
    assert total[2:].isnan().all()
    ones, nothing = torch.ones(5), torch.zeros(5)
    cross_entropy_backward_(logits, targets, nothing, torch.tensor([1.0, 1, 0, 0, 1]), nothing, nothing)
    assert logits[0].tolist() == pytest.approx([2.718281828, 0.0, 7.389056])
    assert logits[1:4].tolist() == [[0.0] * 3] * 3, "exp(-inf), and tokens that nothing is asked of"
    cross_entropy_backward_(
        logits[2:4].fill_(nan), targets[2:4], nothing[:2], ones[:2], nothing[:2], nothing[:2]
    )
    assert logits[2:4].isnan().all()


def test_the_bf16_gradient_keeps_its_digits_where_the_target_is_almost_sure() -> None:
    """p(target) is near 1, and the weight, one over the number of tokens, is no power of two."""
    tokens, vocabulary = 64, 4000
    targets = torch.arange(tokens) * 61 % vocabulary
    exact = randn(tokens, vocabulary)
    exact[torch.arange(tokens), targets] += 15.0
    logits = exact.bfloat16()
    weight = torch.full((tokens,), 1 / 5003)

    def torch_gradient(x: Tensor) -> Tensor:
        x = x.requires_grad_()
        loss = torch.nn.functional.cross_entropy(x.to(torch.promote_types(x.dtype, torch.float32)), targets)
        return torch.autograd.grad(loss * tokens / 5003, x)[0]

    expected = torch_gradient(logits.double())
    torchs_error = (torch_gradient(logits.clone()).double() - expected).norm()
    maximum, total, _, _ = softmax_stats(logits, targets)
    cross_entropy_backward_(logits, targets, maximum, weight / total, -weight, torch.zeros(tokens))
    assert (logits.double() - expected).norm() <= 2 * torchs_error
