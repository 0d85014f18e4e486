"""The CUDA kernels: on the CPU, and on a GPU where there is one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import pytest
import torch

from llm3d.kernels import backend
from tests.csrc import emulation
from tests.csrc.on_gpu import OnGpu
from tests.kernels.backends import WHY_NOT


class Ops(Protocol):
    """The operations of csrc/ops.cpp, of one library. What they are given lies on the CPU."""

    def __getattr__(self, name: str) -> Callable[..., Any]: ...


@pytest.fixture(scope="session")
def emulated() -> Ops:
    """torch.ops.llm3d_on_cpu."""
    try:
        return emulation.emulated()
    except emulation.build.CannotBuild as reason:
        pytest.skip(str(reason))


@pytest.fixture(params=["on the CPU", pytest.param("on a GPU", marks=pytest.mark.gpu)])
def cuda(request: pytest.FixtureRequest) -> Ops:
    """The CUDA kernels."""
    if request.param == "on the CPU":
        return request.getfixturevalue("emulated")
    if not backend.describe("cuda").startswith("native"):
        pytest.skip(f"needs a CUDA device: {backend.describe('cuda')}")
    return OnGpu()


@pytest.fixture
def native() -> Ops:
    """torch.ops.llm3d, for the CPU."""
    if WHY_NOT:
        pytest.skip(WHY_NOT)
    return torch.ops.llm3d
