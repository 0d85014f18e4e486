"""Collectives give every rank its due, and the backward of each is its conjugate."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import Tensor

from llm3d.errors import InputError
from llm3d.parallel import collectives
from llm3d.parallel.agreement import first_failure, input_errors_on_all
from llm3d.parallel.collectives import (
    SumInFlight,
    all_reduce_partial_sums,
    all_reduce_sum,
    gather_bytes,
    gather_rows,
    reduce_scatter_tokens,
    scatter_sum_rows,
)
from llm3d.parallel.mesh import Mesh
from tests import pool
from tests.pool import spawn


def values(rank: int, rows: int) -> Tensor:
    """Whole numbers, so that sums are exact in any order."""
    return torch.arange(rows * 3.0).view(rows, 3) + 100.0**rank


def total(num_ranks: int, rows: int) -> Tensor:
    return torch.stack([values(rank, rows) for rank in range(num_ranks)]).sum(0)


@spawn(world_size=4, tensor=4)
def test_partial_sums_are_added_and_their_gradient_passes_as_it_is(mesh: Mesh) -> None:
    leaf = values(mesh.tensor_rank, 5).requires_grad_()
    out = all_reduce_partial_sums(leaf * 1, mesh.tensor)
    assert torch.equal(out, total(4, 5))
    gradient = values(7, 5)
    out.backward(gradient)
    assert torch.equal(leaf.grad, gradient)


@spawn(world_size=4, tensor=4)
def test_scattered_sums_go_back_as_gathered_gradients(mesh: Mesh) -> None:
    leaf = values(mesh.tensor_rank, 8).requires_grad_()
    out = reduce_scatter_tokens(leaf * 1, mesh.tensor)
    mine = slice(2 * mesh.tensor_rank, 2 * mesh.tensor_rank + 2)
    assert torch.equal(out, total(4, 8)[mine])
    out.backward(values(7, 8)[mine])
    assert torch.equal(leaf.grad, values(7, 8))


@spawn(world_size=4, tensor=2, pipeline=2)
def test_rows_are_gathered_in_rank_order_and_scattered_back(mesh: Mesh) -> None:
    # Of a transposed tensor too: what is sent need not be contiguous.
    mine = values(mesh.tensor_rank, 3).t()
    gathered, work = gather_rows(mine, mesh.tensor)
    assert work is None
    assert torch.equal(gathered, torch.cat([values(0, 3).t(), values(1, 3).t()]))
    assert torch.equal(scatter_sum_rows(gathered, mesh.tensor), 2 * mine)


@spawn(world_size=3, tensor=3)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_sum_in_flight_lands_where_it_is_wanted(mesh: Mesh, dtype: torch.dtype) -> None:
    x = torch.arange(12.0).view(3, 4).to(dtype) * (1 + mesh.tensor_rank)
    expected = SumInFlight(x, mesh.tensor).finish()[0]
    assert torch.equal(expected, 6 * torch.arange(12.0).view(3, 4)[mesh.tensor_rank].to(dtype))
    total = torch.ones_like(expected[None])
    assert SumInFlight(x, mesh.tensor).finish(total, add=True) is total
    assert torch.equal(total[0], expected + 1)
    own = x[mesh.tensor_rank : mesh.tensor_rank + 1]
    SumInFlight(x, mesh.tensor).finish(own)
    assert torch.equal(x[mesh.tensor_rank], expected), "it may overwrite what was sent"


def parts_of_sums(mesh: Mesh, x: Tensor, in_place: bool) -> list[Tensor]:
    """x summed where reduce-scatter is a collective of its own, and the memory that was made for it."""
    with mock.patch.object(collectives, "is_cuda", return_value=True):
        flying = SumInFlight(x, mesh.tensor, in_place=in_place)
    return [flying.finish(), flying.result]


@spawn(world_size=3, tensor=3)
@pytest.mark.parametrize("in_place", [False, True])
def test_a_sum_may_land_in_what_was_sent(mesh: Mesh, in_place: bool) -> None:
    x = values(mesh.tensor_rank, 6)
    total_of_rank, result = parts_of_sums(mesh, x, in_place)
    own = slice(2 * mesh.tensor_rank, 2 * mesh.tensor_rank + 2)
    assert torch.equal(total_of_rank, total(3, 6)[own])
    assert (result.data_ptr() == x[own].data_ptr()) == in_place, "then no memory is taken"


@spawn(world_size=4, tensor=4)
@pytest.mark.parametrize("native", [False, True])
def test_a_narrower_sum_is_rounded_but_lands_in_full_precision(mesh: Mesh, native: bool) -> None:
    x = [torch.randn(8, 64, generator=torch.Generator().manual_seed(rank)) for rank in range(4)]
    mine, own = x[mesh.tensor_rank].clone(), slice(2 * mesh.tensor_rank, 2 * mesh.tensor_rank + 2)
    into = torch.empty(2, 64)
    with mock.patch.object(collectives, "is_cuda", return_value=native):
        flying = SumInFlight(mine, mesh.tensor, torch.bfloat16)
    assert flying.finish(into) is into
    assert torch.equal(mine, x[mesh.tensor_rank]), "what was to be summed is as it was"
    # Each rank's part is rounded once; a sum that is taken in bf16 also after each of the three additions.
    error = (into - sum(x)[own]).abs()
    magnitude = sum(part.abs() for part in x)[own]
    assert (error <= (4 if native else 1) * 2**-8 * magnitude + 1e-6).all()
    assert error.max() > 2**-12, "it was bf16 that travelled"


@spawn(world_size=4, tensor=4)
def test_only_a_whole_share_of_the_tokens_can_be_scattered(mesh: Mesh) -> None:
    with pytest.raises(AssertionError, match="tensor divides the tokens"):
        scatter_sum_rows(values(0, 6), mesh.tensor)


@spawn(world_size=3, pipeline=3)
def test_numbers_are_summed_in_place(mesh: Mesh) -> None:
    summed = torch.tensor([float(mesh.pipeline_rank)])
    assert all_reduce_sum(summed, mesh.everyone) is summed
    assert summed.item() == 3.0


@spawn(world_size=1)
def test_alone_they_change_nothing(mesh: Mesh) -> None:
    x = values(0, 5)
    for collective in (all_reduce_partial_sums, reduce_scatter_tokens, all_reduce_sum):
        assert collective(x, mesh.tensor) is x
    assert torch.equal(x, values(0, 5))
    assert gather_bytes(b"me", mesh.tensor) == [b"me"]


PAYLOADS = [
    [b"", b"", b"", b""],
    [b"one", b"", bytes(range(256)) * 9, "vier, четыре, 四".encode()],
    [b"\0", b"\0\0", b"", b"\0\0\0"],
]


@spawn(world_size=4)
@pytest.mark.parametrize("payloads", PAYLOADS, ids=["empty", "mixed", "zeros"])
def test_bytes_of_any_length_arrive_in_rank_order(mesh: Mesh, payloads: list[bytes]) -> None:
    assert gather_bytes(payloads[mesh.rank], mesh.everyone) == payloads
    assert gather_bytes(payloads[mesh.rank], mesh.data) == payloads


def agree_on_rank(failing: tuple[int, ...]) -> tuple[str | None, str | None]:
    """What a rank is told about failures, and what it raises."""
    mesh = Mesh()
    known = first_failure(f"rank {mesh.rank} fell" if mesh.rank in failing else None, mesh.everyone)
    try:
        with input_errors_on_all(mesh.everyone):
            if mesh.rank in failing:
                raise InputError(f"rank {mesh.rank} fell")
    except InputError as error:
        return known, str(error)
    return known, None


@pytest.mark.parametrize(
    ("failing", "said"),
    [((), None), ((2,), "rank 2 fell"), ((3, 1), "rank 1 fell"), ((0, 1, 2, 3), "rank 0 fell")],
)
def test_a_failure_on_any_rank_is_the_same_failure_on_all(failing: tuple[int, ...], said: str | None) -> None:
    assert pool.run(agree_on_rank, 4, failing) == [(said, said)] * 4


@spawn(world_size=1)
def test_a_bug_is_not_taken_for_wrong_input(mesh: Mesh) -> None:
    with pytest.raises(ZeroDivisionError), input_errors_on_all(mesh.everyone):
        raise ZeroDivisionError
