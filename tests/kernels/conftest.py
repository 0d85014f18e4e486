"""Every test of an operation holds for llm3d's own kernels and for plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from llm3d.kernels.backend import using
from tests.kernels.backends import BACKENDS


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with using(request.param):
        yield request.param
