"""Flat parameters: one storage, gradients summed over the data group once and whole."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from llm3d.parallel import flat as flat_module
from llm3d.parallel.boxes import Box, Piece, ShardedParameter, stack
from llm3d.parallel.flat import FlatParameters
from llm3d.parallel.layers import add_to_main_grad
from llm3d.parallel.mesh import Mesh
from tests import pool
from tests.pool import spawn


class Toy(nn.Module):
    """Two matrices, one of two boxes, around a vector; the first matrix used again in a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first = ShardedParameter.on_meta([Piece(Box.whole("first", (4, 3)))])
        self.vector = ShardedParameter.on_meta([Piece(Box.whole("vector", (5,)))])
        fused = stack([Piece(Box.whole("upper", (2, 3))), Piece(Box.whole("lower", (1, 3)))])
        self.fused = ShardedParameter.on_meta(fused)
        self.head = nn.Module()
        self.head.weight = self.first
        self.first.uses = 2
        self.register_buffer("table", torch.arange(3.0))


def uses(toy: Toy) -> list[ShardedParameter]:
    """Parameters in the order in which a backward pass adds to their gradients."""
    return [toy.head.weight, toy.fused, toy.vector, toy.first]


def backward(toy: Toy, value: float) -> None:
    for parameter in uses(toy):
        add_to_main_grad(parameter, torch.full(parameter.shape, value))


@spawn(world_size=1)
def test_parameters_and_gradients_are_views_of_flat_tensors(mesh: Mesh) -> None:
    toy = Toy()
    flat = FlatParameters([toy], mesh, torch.bfloat16)
    assert flat.parameters.shape == flat.gradients.shape == (4 * 3 + 5 + 3 * 3,)
    assert (flat.parameters.dtype, flat.gradients.dtype) == (torch.bfloat16, torch.float32)
    assert toy.head.weight is toy.first, "a tied parameter stays one"
    flat.parameters.copy_(torch.arange(len(flat.parameters)))
    flat.gradients.copy_(flat.parameters)
    # The last used comes first, matrices before vectors.
    assert torch.equal(toy.fused, torch.arange(9).view(3, 3).bfloat16())
    assert torch.equal(toy.first, torch.arange(9, 21).view(4, 3).bfloat16())
    assert torch.equal(toy.vector, torch.arange(21, 26).bfloat16())
    assert flat.num_decayed == 21
    for parameter in (toy.fused, toy.first, toy.vector):
        assert torch.equal(parameter.main_grad, parameter.float())
    named = {piece.box.name: view for piece, view in flat.pieces(flat.parameters)}
    assert list(named) == ["upper", "lower", "first", "vector"]
    assert torch.equal(named["lower"], toy.fused[2:])


@spawn(world_size=1)
def test_without_training_there_are_no_gradients(mesh: Mesh) -> None:
    toy = Toy()
    flat = FlatParameters([toy], mesh, torch.float32, trainable=False)
    assert not hasattr(flat, "gradients") and flat.buckets == []
    with pytest.raises(AssertionError, match="main_grad"):
        add_to_main_grad(toy.vector, torch.ones(5))


def reduce_on_rank(bucket_bytes: int) -> tuple[Tensor, list[int], list[int]]:
    """Gradients of a step of 3 microbatches, the sizes of messages before its last use, and of all messages."""
    mesh, toy = Mesh(), Toy()
    sizes: list[int] = []

    def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(tensor.numel())
        return all_reduce(tensor, *args, **kwargs)

    all_reduce = dist.all_reduce
    with mock.patch.object(flat_module, "BUCKET_BYTES", bucket_bytes):
        flat = FlatParameters([toy], mesh, torch.float32)
    with mock.patch.object(dist, "all_reduce", counted):
        for step in (1, 2):  # the second starts from zero again
            sizes.clear()
            flat.begin_step(3)
            for microbatch in range(2):
                backward(toy, 10.0**microbatch * step * (mesh.rank + 1))
            early = list(sizes)
            backward(toy, 100.0 * step * (mesh.rank + 1))
            flat.finish_gradients()
    return flat.gradients, early, sizes


@pytest.mark.parametrize(("bucket_bytes", "num_buckets"), [(4, 3), (40, 2), (2**26, 2)])
def test_gradients_are_summed_once_whatever_the_buckets(bucket_bytes: int, num_buckets: int) -> None:
    results = pool.run(reduce_on_rank, 4, bucket_bytes)
    for gradients, early, sizes in results:
        # Two uses of the first matrix, three microbatches, the second step, ranks 1 + 2 + 3 + 4.
        one_use = 111.0 * 2 * 10
        expected = torch.tensor([one_use] * 9 + [2 * one_use] * 12 + [one_use] * 5)
        assert torch.equal(gradients, expected)
        assert early == [], "nothing is sent before the last microbatch"
        assert sum(sizes) == len(expected), "every element is sent once"
        assert len(sizes) == num_buckets


@spawn(world_size=2)
def test_messages_start_while_the_backward_pass_still_runs(mesh: Mesh) -> None:
    toy = Toy()
    with mock.patch.object(flat_module, "BUCKET_BYTES", 4):
        flat = FlatParameters([toy], mesh, torch.float32)
    flat.begin_step(1)
    started = []
    for parameter in uses(toy):
        add_to_main_grad(parameter, torch.ones(parameter.shape))
        started.append([bucket.work is not None for bucket in flat.buckets])
    # Buckets: fused, first (used twice), vector.
    assert started == [[False] * 3, [True, False, False], [True, False, True], [True] * 3]
    flat.finish_gradients()
    assert [bucket.work for bucket in flat.buckets] == [None] * 3


@spawn(world_size=1)
def test_a_step_takes_the_backward_passes_that_were_announced(mesh: Mesh) -> None:
    toy = Toy()
    flat = FlatParameters([toy], mesh, torch.float32)
    flat.begin_step(2)
    backward(toy, 1.0)
    with pytest.raises(AssertionError, match="fewer backward passes"):
        flat.finish_gradients()
    backward(toy, 1.0)
    flat.finish_gradients()
    with pytest.raises(AssertionError, match="more backward passes"):
        backward(toy, 1.0)
    with pytest.raises(AssertionError, match="models are built of parallel layers"):
        FlatParameters([nn.Linear(2, 2)], mesh, torch.float32)


@spawn(world_size=4, tensor=2, pipeline=2)
def test_the_norm_counts_every_element_of_the_model_once(mesh: Mesh) -> None:
    """A matrix cut in two over the tensor group, and a vector that both hold as partial sums."""
    module = nn.Module()
    half = Box.whole(f"matrix {mesh.pipeline_rank}", (4, 2)).rows(2 * mesh.tensor_rank, 2)
    module.matrix = ShardedParameter.on_meta([Piece(half)])
    copied = Piece(Box.whole("vector", (3,)), owned=mesh.tensor_rank == 0, partial=mesh.tensor)
    module.vector = ShardedParameter.on_meta([copied])
    flat = FlatParameters([module], mesh, torch.float32)
    flat.begin_step(1)
    add_to_main_grad(module.matrix, torch.full((2, 2), 3.0))
    add_to_main_grad(module.vector, torch.full((3,), 1.0 + mesh.tensor_rank))
    flat.finish_gradients()
    assert torch.equal(module.vector.main_grad, torch.full((3,), 3.0))
    # Two stages, each with 8 elements of the matrix and 3 of the vector, all of them 3.
    assert flat.gradient_norm().item() == pytest.approx((2 * 11 * 9) ** 0.5)
