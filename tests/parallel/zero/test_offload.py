"""Chunks pass through a few buffers in order, each stepped once with its own gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llm3d.parallel.zero.offload import Chunk, Offload
from tests.gpu import ON_GPU


@pytest.mark.parametrize(
    ("device", "staged"), [("cpu", False), ("cpu", True), pytest.param("cuda", True, marks=ON_GPU)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", [0, 1, 10, 35])
def test_every_chunk_is_stepped_with_its_own_gradient(
    count: int, dtype: torch.dtype, device: str, staged: bool
) -> None:
    offload = Offload(torch.device(device), dtype, staged, chunk_elements=10)
    gradient = torch.arange(float(count), device=device).to(dtype)
    parameter = torch.full((count,), -1.0, dtype=dtype, device=device)
    master = offload.zeros(count, torch.float32)
    done: list[int] = []

    def step(part: slice, arrived: Tensor, room: Tensor | None) -> None:
        master[part] += 2 * arrived
        if room is not None:
            room.copy_(master[part])

    def after(part: slice) -> None:
        assert torch.equal(parameter[part], (2 * gradient[part]).to(dtype)), "the parameter has returned"
        done.append(part.start)

    offload.run(
        [
            Chunk(gradient[p], parameter[p], master[p], lambda g, r, p=p: step(p, g, r), lambda p=p: after(p))
            for p in offload.ranges(0, count)
        ]
    )
    assert done == list(range(0, count, 10))
    assert torch.equal(master, 2 * torch.arange(float(count)))
    assert torch.equal(parameter.cpu(), master.to(dtype))
    assert len(offload.gradients) == 2 * staged, "what is in host memory already is not copied"
