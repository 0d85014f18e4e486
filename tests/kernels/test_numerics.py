"""What the settings say of torch's own CUDA kernels."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from llm3d.kernels.numerics import use_numerics

GPU = torch.device("cuda")


@pytest.fixture(autouse=True)
def put_back(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = True


@pytest.mark.parametrize("deterministic", [True, False])
def test_a_gpu_is_as_deterministic_as_asked(deterministic: bool) -> None:
    use_numerics(GPU, deterministic)
    assert torch.are_deterministic_algorithms_enabled() == deterministic
    assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == (":4096:8" if deterministic else None)


def test_another_model_may_ask_for_the_other() -> None:
    use_numerics(GPU, True)
    use_numerics(GPU, False)
    assert not torch.are_deterministic_algorithms_enabled()


def test_narrow_products_are_summed_in_fp32() -> None:
    use_numerics(GPU, False)
    assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    assert not torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction


def test_a_cpu_is_left_as_it_is() -> None:
    use_numerics(torch.device("cpu"), True)
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
