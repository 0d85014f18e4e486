"""FLOPs of a step, counted by hand and counted by PyTorch as it runs one."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llm3d.config import ModelConfig
from llm3d.data.pretraining import Microbatch, Window, collate
from llm3d.parallel.mesh import Mesh
from llm3d.train.throughput import peak_flops, step_flops
from llm3d.train.trainer import Trainer
from tests.parity.harness import Layout, microbatches, settings
from tests.pool import spawn

MODEL = {
    "vocab_size": 50,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
}


def batch(*lengths: int) -> Microbatch:
    """One sample of segments of these lengths."""
    total = sum(lengths)
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    return collate([Window(torch.zeros(total + 1, dtype=torch.int64), starts)])


@pytest.mark.parametrize("tied", [False, True])
def test_flops_are_those_of_a_hand_count(tied: bool) -> None:
    model = ModelConfig(**MODEL, tie_word_embeddings=tied)
    tokens, lengths = 16, [(10,), (1, 5)]
    # Multiplications a token: queries, keys and values, output; gate, up and down; the head. Norms by the formula.
    layer = 12 * 24 + 2 * 12 * 12 + 24 * 12 + 3 * 12 * 20
    products = 3 * layer + 50 * 12 + (2 * 3 + 1) * 12
    # Scores and weighted sum: 24 multiplications each for every pair of tokens, of which causality leaves half.
    pairs = (10**2 + 1**2 + 5**2) / 2
    forward = 2 * tokens * products + 3 * 2 * 2 * 24 * pairs
    assert step_flops(model, [batch(*segments) for segments in lengths], tokens) == 3 * forward


def added_product(total: torch.Size, a: torch.Size, b: torch.Size, *_: object, **__: object) -> int:
    """FLOPs of total += a b, which PyTorch's counter does not know by itself."""
    return 2 * a[0] * a[1] * b[1]


@spawn(world_size=1)
def test_pytorch_counts_the_same_products(mesh: Mesh) -> None:
    layout = Layout(micro=4)
    config = settings(layout)
    trainer = Trainer(config, mesh)
    trainer.initialize()
    batches = microbatches(layout, 0, 0)
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: added_product}) as counter:
        trainer.step(batches, 1e-3)
    counts = counter.get_flop_counts()["Global"]
    products = sum(counts[op] for op in (torch.ops.aten.mm, torch.ops.aten.addmm_))
    ours = step_flops(config.model, [], sum(len(one.tokens) for one in batches))
    norms = 6 * 8 * 24 * (2 * config.model.num_hidden_layers + 1) * 120
    assert products == ours - norms


def test_there_is_no_peak_of_a_cpu() -> None:
    assert peak_flops(torch.device("cpu"), "fp32") == ("cpu", None)


@pytest.mark.parametrize(
    ("name", "compute", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312e12),
        ("NVIDIA A100-SXM4-80GB", "fp32", 19.5e12),
        ("NVIDIA H100 80GB HBM3", "bf16", 989e12),
        ("Another", "bf16", None),
    ],
)
def test_peaks_are_found_by_the_device(
    name: str, compute: str, peak: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda", 0), compute) == (name, peak)
