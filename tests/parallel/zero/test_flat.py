"""Flat parameters: one storage, gradients summed over the data group once and whole, shards that ZeRO promises."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from llm3d.config import ZeroConfig
from llm3d.parallel import collectives
from llm3d.parallel.boxes import Box, Piece, ShardedParameter, stack
from llm3d.parallel.layers import ColumnParallelLinear, add_to_main_grad
from llm3d.parallel.mesh import Mesh
from llm3d.parallel.zero.flat import FlatParameters
from llm3d.parallel.zero.unit import FlatUnit
from tests import pool
from tests.parallel.zero.traffic import counted_traffic
from tests.pool import spawn


class Part(nn.Module):
    """A module with some parameters, named after their global tensors."""

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            setattr(self, name, ShardedParameter.on_meta([Piece(Box.whole(name, shape))]))


class Toy(nn.Module):
    """Three units; the first's matrix is used again in the last, which has no parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = Part(first=(4, 3))
        self.layer = Part(vector=(5,))
        fused = stack([Piece(Box.whole("upper", (2, 3))), Piece(Box.whole("lower", (1, 3)))])
        self.layer.fused = ShardedParameter.on_meta(fused)
        self.head: Any = nn.Module()
        self.head.weight = self.embedding.first
        self.embedding.first.uses = 2  # type: ignore[union-attr]
        self.register_buffer("table", torch.arange(3.0))

    def units(self) -> list[nn.Module]:
        return [self.embedding, self.layer, self.head]

    def uses(self) -> list[ShardedParameter]:
        """Parameters in the order in which a backward pass adds to their gradients."""
        return [self.head.weight, self.layer.fused, self.layer.vector, self.embedding.first]

    def backward(self, value: float) -> None:
        for parameter in self.uses():
            add_to_main_grad(parameter, torch.full(parameter.shape, value))


class Chain(nn.Module):
    """Linear layers one after the other, each a unit of 64 x 64 elements."""

    def __init__(self, mesh: Mesh, depth: int) -> None:
        super().__init__()
        boxes = [Box.whole(f"layer {i}", (64, 64)) for i in range(depth)]
        self.layers = nn.ModuleList([ColumnParallelLinear([Piece(box)], mesh.tensor) for box in boxes])

    def units(self) -> list[nn.Module]:
        return list(self.layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@spawn(world_size=1)
def test_parameters_and_gradients_are_views_of_flat_tensors(mesh: Mesh) -> None:
    toy = Toy()
    flat = FlatParameters([toy], mesh, torch.bfloat16)
    first, layer = flat.units
    assert len(flat.parameters) == len(flat.gradients) == 2
    assert {p.dtype for p in flat.parameters} == {torch.bfloat16}
    assert {g.dtype for g in flat.gradients} == {torch.float32}
    assert toy.head.weight is toy.embedding.first, "a tied parameter stays one"
    for unit in flat.units:
        unit.parameters.copy_(torch.arange(unit.size))
        unit.gradients.copy_(unit.parameters)
    assert torch.equal(toy.embedding.first, torch.arange(12).view(4, 3).bfloat16())
    # Matrices before vectors.
    assert torch.equal(toy.layer.fused, torch.arange(9).view(3, 3).bfloat16())
    assert torch.equal(toy.layer.vector, torch.arange(9, 14).bfloat16())
    assert (first.num_decayed, layer.num_decayed, layer.num_elements) == (12, 9, 14)
    parameters: list[Any] = list(toy.parameters())
    for parameter in parameters:
        assert torch.equal(parameter.main_grad, parameter.float())
    named = {piece.box.name: view for piece, view in flat.pieces(flat.parameters)}
    assert list(named) == ["first", "upper", "lower", "vector"]
    assert torch.equal(named["lower"], toy.layer.fused[2:])


@spawn(world_size=1)
def test_without_training_there_are_no_gradients(mesh: Mesh) -> None:
    toy = Toy()
    flat = FlatParameters([toy], mesh, torch.float32, trainable=False)
    assert not any(hasattr(unit, "gradients") for unit in flat.units)
    with pytest.raises(AssertionError, match="main_grad"):
        add_to_main_grad(toy.layer.vector, torch.ones(5))


@spawn(world_size=1)
def test_a_parameter_outside_of_all_units_is_found(mesh: Mesh) -> None:
    toy = Toy()
    toy.stray = ShardedParameter.on_meta([Piece(Box.whole("stray", (2,)))])
    with pytest.raises(AssertionError, match="stray is a parameter of no unit"):
        FlatParameters([toy], mesh, torch.float32)


def sums_on_rank(stage: int) -> tuple[list[tuple[Box, Tensor]], list[int]]:
    """Gradients of a step of 3 microbatches, and the number of messages before the last use and in all."""
    mesh, toy = Mesh(), Toy()
    flat = FlatParameters([toy], mesh, torch.float32, ZeroConfig(stage=stage))
    with counted_traffic() as sent:
        for step in (1, 2):  # the second begins anew
            sent.clear()
            flat.begin_step(3)
            for microbatch in range(2):
                toy.backward(10.0**microbatch * step * (mesh.rank + 1))
            early = len(sent)
            toy.backward(100.0 * step * (mesh.rank + 1))
            flat.finish_gradients()
    pieces = [(piece.box, view.clone()) for piece, view in flat.pieces(flat.gradients)]
    return pieces, [early, len(sent)]


@pytest.mark.parametrize("stage", [0, 1])
def test_gradients_are_summed_once_a_step(stage: int) -> None:
    # Two uses of the first matrix, three microbatches, the second step, ranks 1 + 2 + 3 + 4.
    one_use = 111.0 * 2 * 10
    for pieces, messages in pool.run(sums_on_rank, 4, stage):
        assert messages == [0, 2], "one for each unit, none before the last microbatch"
        for box, gradient in pieces:
            assert (gradient == (2 * one_use if box.name == "first" else one_use)).all()


@spawn(world_size=2)
@pytest.mark.parametrize("stage", [0, 1])
def test_messages_start_while_the_backward_pass_still_runs(mesh: Mesh, stage: int) -> None:
    toy = Toy()
    flat = FlatParameters([toy], mesh, torch.float32, ZeroConfig(stage=stage))
    flat.begin_step(1)
    started = []
    with counted_traffic() as sent:
        for parameter in toy.uses():
            add_to_main_grad(parameter, torch.ones(parameter.shape))
            started.append(len(sent))
    # The layer, fused and vector, is done before the matrix that is used twice.
    assert started == [0, 0, 1, 2]
    flat.finish_gradients()


@spawn(world_size=1)
def test_a_step_takes_the_backward_passes_that_were_announced(mesh: Mesh) -> None:
    toy = Toy()
    flat = FlatParameters([toy], mesh, torch.float32)
    flat.begin_step(2)
    toy.backward(1.0)
    with pytest.raises(AssertionError, match="fewer backward passes"):
        flat.finish_gradients()
    toy.backward(1.0)
    flat.finish_gradients()
    with pytest.raises(AssertionError, match="more backward passes"):
        toy.backward(1.0)
    linear: Any = nn.Linear(2, 2)
    linear.units = lambda: [linear]
    with pytest.raises(AssertionError, match="models are built of parallel layers"):
        FlatParameters([linear], mesh, torch.float32)


@pytest.mark.parametrize(("pipeline", "data", "stage"), [(2, 1, 0), (1, 2, 0), (1, 2, 1)])
def test_the_norm_counts_every_element_of_the_model_once(pipeline: int, data: int, stage: int) -> None:
    # Stages each with 8 elements of a matrix and 3 of a vector, all of them 3 on each data rank.
    expected = (pipeline * 11 * (3 * data) ** 2) ** 0.5
    norms = pool.run(norm_on_rank, 4, pipeline, stage)
    assert norms == pytest.approx([expected] * 4)


def norm_on_rank(pipeline: int, stage: int) -> float:
    """A matrix cut in two over the tensor group, and a vector that both hold as partial sums."""
    mesh = Mesh(2, pipeline)
    module: Any = nn.Module()
    half = Box.whole(f"matrix {mesh.pipeline_rank}", (4, 2)).rows(2 * mesh.tensor_rank, 2)
    module.matrix = ShardedParameter.on_meta([Piece(half)])
    copied = Piece(Box.whole("vector", (3,)), owned=mesh.tensor_rank == 0, partial=mesh.tensor)
    module.vector = ShardedParameter.on_meta([copied])
    module.units = lambda: [module]
    flat = FlatParameters([module], mesh, torch.float32, ZeroConfig(stage=stage))
    flat.begin_step(1)
    add_to_main_grad(module.matrix, torch.full((2, 2), 3.0))
    add_to_main_grad(module.vector, torch.full((3,), 1.0 + mesh.tensor_rank))
    flat.finish_gradients()
    return flat.gradient_norm().item()


# ---- what is there when ----


def chain(mesh: Mesh, depth: int, **zero: int) -> tuple[Chain, FlatParameters]:
    """A chain whose layer i multiplies by i + 1."""
    made = Chain(mesh, depth)
    flat = FlatParameters([made], mesh, torch.float32, ZeroConfig(**zero))
    for piece, view in flat.pieces(flat.parameters):
        row, column = piece.box.offset
        diagonal = torch.eye(64)[row : row + piece.box.size[0], column : column + piece.box.size[1]]
        view.copy_(diagonal * (1 + int(piece.box.name.split()[1])))
    for unit in flat.units:
        flat.all_gather_parameters(unit)
    return made, flat


def when_accumulated(weight: ShardedParameter, look: Callable[[], None]) -> None:
    """Look when the gradient of the weight has been computed, before ZeRO hears of it."""
    told = weight.on_accumulated
    assert told is not None

    def look_and_tell() -> None:
        look()
        told()

    weight.on_accumulated = look_and_tell


class EndsLate:
    """A gather that writes its result when it is waited for: this rank's share as it was at the start."""

    def __init__(self, unit: FlatUnit) -> None:
        assert unit.gathering is not None
        self.work, self.share, self.at_start = unit.gathering, unit.parameters, unit.parameters.clone()

    def wait(self) -> None:
        self.work.wait()
        self.share.copy_(self.at_start)


@spawn(world_size=2)
@pytest.mark.parametrize("stage", [1, 2])
def test_weights_are_written_when_nothing_is_on_its_way(mesh: Mesh, stage: int) -> None:
    """A gather of earlier ones, still under way, does not put them back."""
    _, flat = chain(mesh, 3, stage=stage)
    for unit in flat.units:
        flat.all_gather_parameters(unit)
        unit.gathering = EndsLate(unit)  # type: ignore[assignment]
    for _, view in flat.weights(flat.parameters):
        view.fill_(3.0)
    for unit in flat.units:
        flat.all_gather_parameters(unit)
    flat.wait_all_gathers()
    for unit in flat.units:
        assert (unit.whole[: unit.num_elements] == 3.0).all()


@spawn(world_size=4)
@pytest.mark.parametrize("prefetch", [1, 2])
def test_stage_3_has_only_the_parameters_that_are_soon_used(mesh: Mesh, prefetch: int) -> None:
    made, flat = chain(mesh, 6, stage=3, prefetch=prefetch)
    there: list[list[int]] = []

    def look(*_: object) -> None:
        there.append([i for i, unit in enumerate(flat.units) if unit.gathered])

    for layer in made.layers:
        layer.register_forward_hook(look, prepend=True)
        when_accumulated(layer.weight, look)
    flat.begin_step(1)
    made(torch.ones(2, 64, requires_grad=True)).sum().backward()
    flat.finish_gradients()
    # What forward ends with stays, as backward begins with it.
    assert there[:6] == [list(range(i, min(6, i + 1 + prefetch))) for i in range(6)]
    assert there[6:] == [list(range(max(0, i - prefetch), i + 1)) for i in reversed(range(6))]
    assert not any(unit.gathered for unit in flat.units), "nothing but shards outlives the step"
    assert all(len(shard) == 64 * 64 // 4 for shard in (*flat.parameters, *flat.gradients))


@spawn(world_size=4)
@pytest.mark.parametrize("stage", [2, 3])
def test_whole_gradients_are_never_all_there(mesh: Mesh, stage: int) -> None:
    made, flat = chain(mesh, 6, stage=stage)
    there: list[int] = []

    def look() -> None:
        whole = sum(unit.whole_gradients is not None for unit in flat.units)
        there.append(whole + len(flat._sums))

    for layer in made.layers:
        when_accumulated(layer.weight, look)
    flat.begin_step(3)
    for _ in range(3):
        made(torch.ones(2, 64, requires_grad=True)).sum().backward()
    flat.finish_gradients()
    assert max(there) == 2, "one being computed, one on its way"
    assert all(unit.whole_gradients is None for unit in flat.units)
    parameters: list[Any] = list(made.parameters())
    assert all(parameter.main_grad is None for parameter in parameters)


@contextmanager
def sums_as_on_a_gpu() -> Iterator[None]:
    """Reduce-scatter is a collective of its own."""
    with mock.patch.object(collectives, "is_cuda", return_value=True):
        yield


@spawn(world_size=4)
@pytest.mark.parametrize(
    ("stage", "reduce", "flying"),
    [
        (0, torch.float32, 6),
        (1, torch.float32, 6),  # where gradients are kept: as many as there are
        (0, torch.bfloat16, 2),
        (1, torch.bfloat16, 2),  # two copies in half precision take what one unit's gradients do
        (2, torch.float32, 1),
        (2, torch.bfloat16, 2),
        (3, torch.bfloat16, 2),
    ],
    ids=str,
)
def test_sums_fly_as_far_as_memory_goes(mesh: Mesh, stage: int, reduce: torch.dtype, flying: int) -> None:
    made = Chain(mesh, 6)
    flat = FlatParameters([made], mesh, torch.float32, ZeroConfig(stage=stage), reduce_dtype=reduce)
    most, most_bytes = 0, 0

    def look() -> None:
        nonlocal most, most_bytes
        most = max(most, len(flat._sums))
        most_bytes = max(most_bytes, sum(each.nbytes for each in flat._sums))

    for layer in made.layers:
        when_accumulated(layer.weight, look)
    with sums_as_on_a_gpu():
        flat.begin_step(1)
        made(torch.ones(2, 64, requires_grad=True)).sum().backward()
        look()
        flat.finish_gradients()
    assert most == flying
    assert most_bytes <= UNIT_BYTES, "no more than one unit's gradients take"
    assert (most_bytes == 0) == (stage < 2 and reduce == torch.float32)


def narrow_sums_on_rank(stage: int, as_on_a_gpu: bool) -> float:
    """Sum random gradients in bf16 and in fp32; -> how many bytes went for one of fp32."""
    mesh = Mesh()
    values = [torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(rank)) for rank in range(4)]
    sent, found = {}, {}
    for dtype in (torch.float32, torch.bfloat16):
        made = Chain(mesh, 3)
        zero = ZeroConfig(stage=stage)
        flat = FlatParameters([made], mesh, torch.float32, zero, reduce_dtype=dtype)
        flat.begin_step(1)
        with sums_as_on_a_gpu() if as_on_a_gpu else nullcontext(), counted_traffic() as traffic:
            for unit in reversed(flat.units):
                if stage >= 2:
                    unit.attach(torch.empty(unit.size))
            for layer, value in zip(made.layers, values[mesh.rank], strict=True):
                add_to_main_grad(layer.weight, value)
            flat.finish_gradients()
        sent[dtype] = sum(traffic)
        found[dtype] = [(piece.box, view.clone()) for piece, view in flat.pieces(flat.gradients)]
    magnitude = sum(value.abs() for value in values)
    for (box, wide), (_, narrow) in zip(found[torch.float32], found[torch.bfloat16], strict=True):
        rows = slice(box.offset[0], box.offset[0] + box.size[0])
        columns = slice(box.offset[1], box.offset[1] + box.size[1])
        allowed = 4 * 2**-8 * magnitude[int(box.name.split()[1])][rows, columns] + 1e-6
        assert ((narrow - wide).abs() <= allowed).all()
        assert not torch.equal(narrow, wide) and narrow.dtype == torch.float32
    return sent[torch.bfloat16] / sent[torch.float32]


@pytest.mark.parametrize("as_on_a_gpu", [False, True])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_gradients_may_be_summed_in_bf16(stage: int, as_on_a_gpu: bool) -> None:
    """Half the bytes; each rank's part is rounded once, and again with each addition where ranks add in bf16."""
    assert pool.run(narrow_sums_on_rank, 4, stage, as_on_a_gpu) == [0.5] * 4


@spawn(world_size=4)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_chain_computes_what_it_says_and_its_gradient_is_exact(mesh: Mesh, stage: int) -> None:
    made, flat = chain(mesh, 4, stage=stage)
    x = torch.ones(2, 64, requires_grad=True)
    with torch.no_grad():
        assert torch.equal(made(x), torch.full((2, 64), 24.0))
    for _ in range(2):  # the second step begins anew
        flat.begin_step(3)
        for factor in (1, 10, 100):
            made(x).backward(torch.full((2, 64), factor * (mesh.rank + 1.0)))
        flat.finish_gradients()
    # Layer i sees i! and is followed by 24 / (i + 1)!; two rows of x, ranks 1 + 2 + 3 + 4, three microbatches.
    for piece, gradient in flat.pieces(flat.gradients):
        assert (gradient == 24 / (1 + int(piece.box.name.split()[1])) * 2 * 10 * 111).all()
    assert flat.gradient_norm().item() == pytest.approx(
        sum((64 * 24 / (1 + i) * 2220) ** 2 for i in range(4)) ** 0.5
    )


# ---- communication ----

UNIT_BYTES = 64 * 64 * 4


@pytest.mark.parametrize("world_size", [2, 4, 8])
@pytest.mark.parametrize(
    ("stage", "gradients", "parameters"),
    [
        (0, 3, 3),  # the all-reduce counts as both halves
        (1, 3, 3),
        (2, 2 * 3, 3),  # two microbatches
        (3, 2 * 3, 2 * (3 + 2)),  # the last layer is not gathered again for backward
    ],
)
def test_a_step_sends_what_the_paper_promises(
    world_size: int, stage: int, gradients: int, parameters: int
) -> None:
    """Of three units; in units, each times (n - 1) / n."""
    expected = (gradients + parameters) * UNIT_BYTES * (world_size - 1) // world_size
    for sent, foretold in pool.run(traffic_on_rank, world_size, stage):
        assert sent == foretold == expected


def traffic_on_rank(stage: int) -> tuple[int, int]:
    mesh = Mesh()
    made, flat = chain(mesh, 3, stage=stage)
    flat.wait_all_gathers()
    each, once = flat.traffic()
    with counted_traffic() as sent:
        flat.begin_step(2)
        for _ in range(2):
            made(torch.ones(2, 64, requires_grad=True)).sum().backward()
        flat.finish_gradients()
        for unit in flat.units:
            flat.all_gather_parameters(unit)
        flat.wait_all_gathers()
    return sum(sent), 2 * each + once
