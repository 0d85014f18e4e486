"""Products of linear layers are the same numbers by whichever library, and every rank takes the same one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from llm3d.kernels import linear as products
from llm3d.kernels.linear import KINDS, MIN_ROWS
from llm3d.parallel.mesh import Mesh
from llm3d.parallel.products import choose_products
from tests import pool
from tests.closeness import assert_same_tensors
from tests.kernels.exactness import assert_close
from tests.parity.harness import Layout, OnRank, put_together, train, train_on_rank
from tests.pool import spawn

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="PyTorch was built without oneDNN"
)
SHAPE = OUT, IN = 640, 448  # not small, and no multiple of a vector's width that both libraries like


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before = products._by_onednn, products._measured
    yield
    products._by_onednn, products._measured = before


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def three_products(rows: int, transposed: bool) -> tuple[list[Tensor], list[Tensor]]:
    """What the products give, and in float64."""
    x, weight, grad = numbers(rows, IN, seed=1), numbers(OUT, IN, seed=2), numbers(rows, OUT, seed=3)
    if transposed:  # the same numbers with other strides
        x, grad = x.t().contiguous().t(), grad.t().contiguous().t()
    total, stale = numbers(OUT, IN, seed=4), torch.full((OUT, IN), torch.nan)
    expected_total = total.double() + grad.double().t() @ x.double()
    products.add_linear_weight_gradient_(total, grad, x)
    products.add_linear_weight_gradient_(stale, grad, x, replace=True)
    into = torch.empty(rows, IN)
    found = [
        products.linear(x, weight),
        products.linear_input_gradient(grad, weight),
        products.linear_input_gradient(grad, weight, out=into),
        total,
        stale,
    ]
    input_gradient = grad.double() @ weight.double()
    expected = [
        x.double() @ weight.double().t(),
        input_gradient,
        input_gradient,
        expected_total,
        grad.double().t() @ x.double(),
    ]
    return found, expected


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rows", [MIN_ROWS - 1, MIN_ROWS, 201])
@pytest.mark.parametrize("by_onednn", [(), KINDS, *((kind,) for kind in KINDS)], ids=str)
def test_products_are_exact_and_repeat_bit_for_bit(
    by_onednn: tuple[products.Kind, ...], rows: int, transposed: bool
) -> None:
    products.take(by_onednn)
    found, expected = three_products(rows, transposed)
    again, _ = three_products(rows, transposed)
    for each, same, exact in zip(found, again, expected, strict=True):
        assert torch.equal(each, same)
        assert_close(each, exact)


def test_only_what_was_taken_is_computed_by_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = products._onednn
    monkeypatch.setattr(products, "_onednn", lambda *tensors: (calls.append(1), original(*tensors))[1])
    three_products(201, False)
    assert not calls
    for kinds, number in ((("forward",), 1), (("input gradient",), 2), (KINDS, 5), ((), 0)):
        calls.clear()
        products.take(kinds)
        three_products(201, False)
        assert len(calls) == number
        calls.clear()
        three_products(MIN_ROWS - 1, False)
        products.linear(torch.ones(201, 8), torch.ones(OUT, 8))
        assert not calls, "few rows, or a small weight"


def test_what_is_faster_is_found_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that takes half the time is taken; a little more or less decides nothing; and once is enough."""
    clock, taken = [0.0], {"blas": 1.0, "onednn": 1.0}
    monkeypatch.setattr(products.time, "perf_counter", lambda: clock[0])

    def computing(*tensors: Tensor) -> None:
        clock[0] += taken["onednn" if products._by_onednn else "blas"]

    for kind in ("linear", "linear_input_gradient", "add_linear_weight_gradient_"):
        monkeypatch.setattr(products, kind, computing)
    for blas, onednn, expected in ((1.0, 2.0, ()), (1.4, 1.0, ()), (2.0, 1.0, KINDS)):
        taken.update(blas=blas, onednn=onednn)
        products._measured = None
        assert products.faster_by_onednn([SHAPE, (IN, OUT)]) == expected
    taken.update(blas=1.0)
    assert products.faster_by_onednn([SHAPE]) == KINDS
    assert not products._by_onednn


@spawn(world_size=3)
def test_every_rank_takes_what_the_first_finds(mesh: Mesh) -> None:
    """Also for weights that only another rank has, as under a pipeline."""
    asked, measure = [], products.faster_by_onednn

    def found(shapes: object) -> tuple[products.Kind, ...]:
        asked.append(shapes)
        return KINDS[: 1 + mesh.rank]

    products.faster_by_onednn = found
    try:
        shape = SHAPE if mesh.rank < 2 else (IN, OUT)
        weights = [torch.empty(shape, device="meta"), torch.empty(8, 8), torch.empty(OUT * IN)]
        choose_products(weights, mesh.everyone)
        assert products._by_onednn == {"forward"}
        assert asked == ([[(IN, OUT), SHAPE]] if mesh.rank == 0 else [])
    finally:
        products.faster_by_onednn, products._by_onednn = measure, frozenset()


def train_by_onednn(layout: Layout) -> OnRank:
    """Every product, however small."""
    measured, limits = products.faster_by_onednn, (products.MIN_ROWS, products.MIN_WEIGHTS)
    products.faster_by_onednn, products.MIN_ROWS, products.MIN_WEIGHTS = lambda shapes: KINDS, 1, 1
    try:
        ran = train_on_rank(layout, steps=2)
        assert products._by_onednn == {*KINDS}
        return ran
    finally:
        products.faster_by_onednn, (products.MIN_ROWS, products.MIN_WEIGHTS) = measured, limits
        products._by_onednn = frozenset()


@pytest.mark.parametrize("layout", [Layout(micro=4), Layout(tensor=2, sequence=True, micro=4)], ids=str)
def test_training_is_the_same_by_onednn(layout: Layout) -> None:
    expected = train(Layout(micro=4), steps=2)
    actual = put_together(pool.run(train_by_onednn, layout.world_size, layout))
    assert actual.losses == pytest.approx(expected.losses, rel=1e-5)
    assert actual.grad_norms == pytest.approx(expected.grad_norms, rel=1e-5)
    assert_same_tensors(actual.gradients, expected.gradients, 1e-5)
