"""A linear layer with a bias is PyTorch's, on any number of ranks; each element of the bias is in checkpoints once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from llm3d.config import ZeroConfig
from llm3d.parallel.boxes import Box, Piece, stack
from llm3d.parallel.layers import ColumnParallelLinear, RowParallelLinear, split_evenly
from llm3d.parallel.mesh import Mesh
from llm3d.parallel.zero.flat import FlatParameters
from tests import pool
from tests.kernels.exactness import assert_close, randn

TOKENS, HIDDEN, INNER = 24, 8, 12
SHAPES = {"q.weight": (INNER, HIDDEN), "k.weight": (INNER, HIDDEN), "o.weight": (HIDDEN, 2 * INNER)}
VALUES = {
    name: randn(*shape, seed=i).float()
    for i, (name, shape) in enumerate(
        [*SHAPES.items(), *((name.replace("weight", "bias"), shape[:1]) for name, shape in SHAPES.items())]
    )
}


class TwoLayers(nn.Module):
    """Two projections in one column-parallel layer, and a row-parallel one after them."""

    def __init__(self, mesh: Mesh, sequence: bool) -> None:
        super().__init__()
        part, columns = split_evenly(INNER, mesh.tensor), split_evenly(INNER, mesh.tensor)
        pieces = [
            Piece(Box.whole(name, SHAPES[name]).rows(part.start, len(part)))
            for name in ("q.weight", "k.weight")
        ]
        self.column = ColumnParallelLinear(stack(pieces), mesh.tensor, sequence, bias=True)
        # Its inputs are this rank's part of q and of k: see `forward`.
        whole = Box.whole("o.weight", SHAPES["o.weight"])
        self.rows = nn.ModuleList(
            RowParallelLinear(
                Piece(whole.columns(first + columns.start, len(columns))),
                mesh.tensor,
                sequence,
                bias=first == 0,
            )
            for first in (0, INNER)
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.column(x).chunk(2, dim=1)
        return self.rows[0](q.tanh()) + self.rows[1](k.tanh())

    def units(self) -> list[nn.Module]:
        return [self]


def microbatch(number: int) -> tuple[Tensor, Tensor]:
    return randn(TOKENS, HIDDEN, seed=10 + number).float(), randn(TOKENS, HIDDEN, seed=20 + number).float()


def on_rank(tensor: int, sequence: bool, zero: int) -> tuple[Tensor, list[tuple[Box, Tensor]]]:
    """The first microbatch's output, and the owned pieces of the gradient of two microbatches on each data rank."""
    mesh = Mesh(tensor=tensor)
    model = TwoLayers(mesh, sequence)
    flat = FlatParameters([model], mesh, torch.float32, ZeroConfig(stage=zero))
    for piece, view in flat.weights(flat.parameters):
        view.copy_(VALUES[piece.box.name][piece.box.slices_within(Box.whole("", piece.box.shape))])
    for unit in flat.units:
        flat.all_gather_parameters(unit)
    share = split_evenly(TOKENS, mesh.tensor) if sequence else range(TOKENS)
    rows, outputs = slice(share.start, share.stop), []
    flat.begin_step(2)
    for number in range(2):
        x, gradient = microbatch(2 * mesh.data_rank + number)
        y = model(x[rows].requires_grad_())
        y.backward(gradient[rows])
        outputs.append(y.detach())
    flat.finish_gradients()
    return outputs[0], [(p.box, view.clone()) for p, view in flat.pieces(flat.gradients) if p.owned]


def expected(num_microbatches: int) -> tuple[Tensor, dict[str, Tensor]]:
    values = {name: value.double().requires_grad_() for name, value in VALUES.items()}
    outputs = []
    for number in range(num_microbatches):
        x, gradient = (each.double() for each in microbatch(number))
        q, k = (x @ values[f"{name}.weight"].t() + values[f"{name}.bias"] for name in "qk")
        y = torch.cat([q, k], 1).tanh() @ values["o.weight"].t() + values["o.bias"]
        y.backward(gradient)
        outputs.append(y.detach())
    return outputs[0], {name: value.grad for name, value in values.items() if value.grad is not None}


@pytest.mark.parametrize(
    ("world_size", "tensor", "sequence", "zero"),
    [(1, 1, False, 0), (2, 2, False, 0), (2, 2, True, 0), (4, 4, True, 0), (4, 2, True, 1), (4, 2, False, 3)],
)
def test_a_bias_is_added_once_and_has_the_gradient_of_all_tokens(
    world_size: int, tensor: int, sequence: bool, zero: int
) -> None:
    ranks = pool.run(on_rank, world_size, tensor, sequence, zero)
    output, gradients = expected(2 * world_size // tensor)
    found = {name: torch.zeros(value.shape) for name, value in VALUES.items()}
    times = {name: torch.zeros(value.shape) for name, value in VALUES.items()}
    copies = ranks[: tensor if zero == 0 else world_size]  # in ZeRO stage 0 data ranks hold the same
    for _, pieces in copies:
        for box, value in pieces:
            where = box.slices_within(Box.whole(box.name, box.shape))
            found[box.name][where] += value
            times[box.name][where] += 1
    for name, gradient in gradients.items():
        assert (times[name] == 1).all(), name
        assert_close(found[name], gradient)
    outputs = [rank[0] for rank in ranks[:tensor]]
    assert_close(torch.cat(outputs) if sequence else outputs[0], output)
