"""What computes in the tests; where there was no compiler, there are no native kernels to test."""

from __future__ import annotations

import pytest

from llm3d.errors import InputError
from llm3d.kernels.backend import use, using

WHY_NOT = ""  # why there are no native kernels for the CPU
try:
    with using("native"):
        use("native", "cpu")
except InputError as reason:
    WHY_NOT = str(reason)
needs_native = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)
BACKENDS = [pytest.param("native", marks=needs_native), "reference"]
