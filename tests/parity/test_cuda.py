"""A GPU trains as a CPU does."""

from __future__ import annotations

import pytest
import torch

from llm3d.parallel.mesh import Mesh
from llm3d.train.trainer import Notice, Trainer
from tests.gpu import RUNS_ON_GPU
from tests.parity.harness import Layout, microbatches, settings, train_on_rank

pytestmark = RUNS_ON_GPU


@pytest.mark.parametrize("offload", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_fp32_training_is_that_of_the_cpu(recompute: str, offload: float) -> None:
    layout = Layout(micro=2, recompute=recompute, offload=offload)
    torch.backends.cuda.matmul.allow_tf32 = False
    expected, expected_pieces = train_on_rank(layout, 3, "cpu")
    actual, pieces = train_on_rank(layout, 3, "cuda")
    assert actual.losses == pytest.approx(expected.losses, rel=1e-5)
    assert actual.grad_norms == pytest.approx(expected.grad_norms, rel=1e-5)
    for (box, gradient), (_, reference) in zip(
        pieces["gradients"], expected_pieces["gradients"], strict=True
    ):
        assert float((gradient.cpu() - reference).norm() / reference.norm()) < 1e-5, box


@pytest.mark.parametrize("offload", [0.0, 1.0])
@pytest.mark.parametrize("compute", ["bf16", "fp16"])
def test_narrow_losses_are_as_close_to_fp32_as_on_the_cpu(compute: str, offload: float) -> None:
    exact, _ = train_on_rank(Layout(micro=2), 3, "cpu")
    on_cpu, _ = train_on_rank(Layout(micro=2, compute=compute), 3, "cpu")
    on_gpu, _ = train_on_rank(Layout(micro=2, compute=compute, offload=offload), 3, "cuda")
    allowed = 2 * max(abs(a - b) for a, b in zip(on_cpu.losses, exact.losses, strict=True))
    assert max(abs(a - b) for a, b in zip(on_gpu.losses, exact.losses, strict=True)) <= allowed


def test_training_on_the_gpu_is_repeatable_to_the_bit() -> None:
    first, first_pieces = train_on_rank(Layout(micro=2, compute="bf16"), 3, "cuda")
    second, second_pieces = train_on_rank(Layout(micro=2, compute="bf16"), 3, "cuda")
    assert (first.losses, first.grad_norms) == (second.losses, second.grad_norms)
    for (_, a), (_, b) in zip(first_pieces["weights"], second_pieces["weights"], strict=True):
        assert torch.equal(a, b)


def test_the_host_waits_for_nothing_before_all_is_launched() -> None:
    """With kernels of our own, which ask no tensor for its value."""
    layout = Layout(micro=2, compute="bf16", model=(("hidden_size", 96),))  # heads that flash attention takes
    config = settings(layout)
    kernels = config.kernels.model_copy(update={"backend": "native"})
    trainer = Trainer(config.model_copy(update={"kernels": kernels}), Mesh(device="cuda"))
    trainer.initialize()
    first, second = ([batch.to("cuda") for batch in microbatches(layout, step, 0)] for step in range(2))
    told: list[str] = []

    def tell() -> Notice:
        torch.cuda.set_sync_debug_mode("default")
        told.append("all is launched")
        return Notice()

    trainer.step(first, 1e-3)  # makes communicators and loads kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.step(second, 1e-3, tell)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert told
