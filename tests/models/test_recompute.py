"""What is recomputed in backward costs what is said of it, and changes no bit."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llm3d.parallel.mesh import Mesh
from llm3d.train.trainer import Trainer
from tests import pool
from tests.kernels.backends import needs_native
from tests.parity.harness import LEARNING_RATE, Layout, microbatches, settings, shape_of, train

PLAIN = Layout(micro=4)


class Operations(TorchDispatchMode):
    """How often each operation runs."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def operations_on_rank(layout: Layout) -> tuple[Counter[str], int]:
    """Of one step's forward and backward, and of how many microbatches."""
    trainer = Trainer(settings(layout), Mesh(layout.tensor, layout.pipeline))
    trainer.initialize()
    batches = microbatches(layout, 0, 0)
    with Operations() as operations:
        trainer.step(batches, LEARNING_RATE)
    return operations.counts, len(batches)


def additional_operations(layout: Layout, recompute: str) -> dict[str, float]:
    """In each layer, forward and backward of a microbatch, beside those without recomputation."""
    (plain, _), (counts, microbatches_) = (
        pool.run(operations_on_rank, layout.world_size, replace(layout, recompute=kind))[0]
        for kind in ("none", recompute)
    )
    num_layers = dict(shape_of(layout))["num_hidden_layers"]
    return {name: count / (microbatches_ * num_layers) for name, count in (counts - plain).items()}


@needs_native
def test_selective_makes_norms_and_swiglu_again_and_nothing_else() -> None:
    assert additional_operations(PLAIN, "selective") == {"rms_norm_forward": 2, "swiglu_forward": 1}


@pytest.mark.parametrize("layout", [PLAIN, Layout(tensor=2, sequence=True, micro=4)], ids=str)
def test_selective_makes_no_product_and_no_attention_again(layout: Layout) -> None:
    extra = additional_operations(layout, "selective")
    assert extra and not [
        name for name in extra if any(word in name for word in ("mm", "linear", "attention"))
    ]


@needs_native
def test_full_makes_each_layer_again() -> None:
    extra = additional_operations(PLAIN, "full")
    assert (extra["rope_"], extra["swiglu_forward"]) == (1, 1)


def test_what_is_made_again_is_the_same_bit_for_bit() -> None:
    plain, selective = (train(replace(PLAIN, recompute=kind)) for kind in ("none", "selective"))
    assert (plain.losses, plain.grad_norms) == (selective.losses, selective.grad_norms)
    for name, weight in plain.weights.items():
        assert torch.equal(weight, selective.weights[name]), name
