"""What does not fit into the host's memory is refused by all ranks before any of it is taken."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch

from llm3d.errors import InputError
from llm3d.parallel.mesh import Mesh
from llm3d.train import trainer as trainer_module
from llm3d.train.trainer import ShardedModel, Trainer, host_bytes
from tests import pool
from tests.parity.harness import Layout, settings
from tests.parity.stage_settings import settings as stage_settings

LAYOUTS = [
    Layout(),
    Layout(offload=1.0),
    Layout(data=2, zero=1, compute="bf16"),
    Layout(data=2, zero=2, compute="fp16"),
    Layout(data=4, zero=3, compute="bf16", offload=0.5),
    Layout(tensor=2, pipeline=2, data=2, zero=3),
]
ADAPTERS = [Layout(), Layout(data=2, zero=1, compute="bf16"), Layout(tensor=2, data=2, zero=3, offload=1.0)]


def kept_and_foretold(layout: Layout, adapters: bool = False) -> tuple[int, float]:
    mesh = Mesh(layout.tensor, layout.pipeline)
    config = stage_settings("sft-lora", layout) if adapters else settings(layout)
    trainer = Trainer(config, mesh)
    units = [*trainer.flat.units, *trainer.flat.frozen]
    tensors = [tensor for unit in units for tensor in (unit.parameters, unit.whole)]
    tensors += [
        *trainer.flat.gradients,
        *(g for u in trainer.flat.units if (g := u.whole_gradients) is not None),
    ]
    tensors += [*trainer.optimizer.master, *trainer.optimizer.exp_avg, *trainer.optimizer.exp_avg_sq]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    foretold = mock.Mock(side_effect=host_bytes)
    with mock.patch.object(trainer_module, "host_bytes", foretold):
        Trainer(config, mesh)
    return sum(storages.values()), host_bytes(*foretold.call_args.args)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout}-{layout.compute}")
def test_what_is_asked_for_is_what_is_kept(layout: Layout) -> None:
    for kept, foretold in pool.run(kept_and_foretold, layout.world_size, layout):
        assert foretold == pytest.approx(kept, rel=0.02)


@pytest.mark.parametrize("layout", ADAPTERS, ids=lambda layout: f"{layout}-{layout.compute}")
def test_frozen_weights_ask_for_no_gradients_and_no_state(layout: Layout) -> None:
    for kept, foretold in pool.run(kept_and_foretold, layout.world_size, layout, True):
        assert foretold == pytest.approx(kept, rel=0.02)


def refused_on_rank(layout: Layout, trainable: bool) -> str:
    """With memory for all of it on rank 0, and on rank 1 for a tenth."""
    mesh = Mesh()
    plenty = 10**9 if mesh.rank == 0 else 10**6
    made = mock.Mock(side_effect=AssertionError("memory was taken"))
    with (
        mock.patch.object(trainer_module, "available_memory", return_value=plenty),
        mock.patch.object(trainer_module, "FlatParameters", made),
        pytest.raises(InputError) as refused,
    ):
        (Trainer if trainable else ShardedModel)(settings(layout), mesh)
    return str(refused.value)


@pytest.mark.parametrize("trainable", [False, True])
def test_too_little_on_one_host_is_said_by_all(trainable: bool) -> None:
    said = pool.run(refused_on_rank, 2, Layout(data=2, zero=1), trainable)
    assert said[0] == said[1] and "keep 0.0 GiB in its memory, of which 0.0 GiB are left" in said[0]


def on_a_gpu(layout: Layout) -> float:
    mesh = Mesh()
    mesh.device = torch.device("cuda")
    return host_bytes(settings(layout), mesh, num_trained=1000, num_frozen=10**6)


def test_a_gpu_takes_of_the_host_what_is_offloaded() -> None:
    layout = Layout(data=2, zero=1, compute="bf16")
    for offload, expected in ((0.0, 0), (0.5, 3000), (1.0, 6000)):
        assert pool.run(on_a_gpu, 2, replace(layout, offload=offload)) == [expected] * 2
