"""The CUDA kernels, on the CPU."""

from __future__ import annotations

import pytest
import torch

from tests.csrc import emulation


@pytest.fixture(scope="session")
def emulated() -> torch._ops._OpNamespace:
    """torch.ops.llm3d_on_cpu."""
    try:
        return emulation.emulated()
    except emulation.build.CannotBuild as reason:
        pytest.skip(str(reason))
