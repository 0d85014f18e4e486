"""A few training steps under any layout, reported in global coordinates."""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llm3d.config import PretrainConfig
from llm3d.data.pretraining import Microbatch, Window, collate
from llm3d.models.batch import Batch
from llm3d.parallel.mesh import Mesh
from llm3d.train.trainer import Trainer
from tests import pool

SEQUENCE_LENGTH = 24
GLOBAL_BATCH = 8
LEARNING_RATE = 3e-4
NUM_STEPS = (
    2  # the second starts from weights and moments that the first has made; a third does what the second did
)
VOCAB_SIZE = 515

# Grouped queries, nothing a power of two, a vocabulary that two does not divide.
MODEL = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 120,
    "intermediate_size": 172,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "rope_theta": 10000.0,
    "max_position_embeddings": 64,
}
Shape = tuple[tuple[str, Any], ...]
TIED: Shape = (("tie_word_embeddings", True),)
QWEN3: Shape = (("model_type", "qwen3"), ("head_dim", 14))


@dataclass(frozen=True)
class Layout:
    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    chunks: int = 1
    schedule: str = "1f1b"
    sequence: bool = False
    recompute: str = "none"
    micro: int = 1
    layers_per_stage: tuple[int, ...] | None = None
    model: Shape = ()
    compute: str = "fp32"
    zero: int = 0
    prefetch: int = 1
    offload: float = 0.0  # share of the optimizer's state
    moments: str = "fp32"

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.data

    def __str__(self) -> str:
        words = [f"t{self.tensor}p{self.pipeline}d{self.data}"]
        words += [f"{self.schedule}x{self.chunks}"] if self.pipeline > 1 else []
        words += ["sequence"] * self.sequence + [self.recompute] * (self.recompute != "none")
        words += [f"zero{self.zero}"] * (self.zero > 0) + [f"prefetch{self.prefetch}"] * (self.prefetch > 1)
        words += [f"offload{self.offload:g}"] * (self.offload > 0)
        words += [f"micro{self.micro}"] * (self.micro > 1) + ["uneven"] * (self.layers_per_stage is not None)
        return "-".join(words + [f"{name}={value}" for name, value in self.model])


def shape_of(layout: Layout) -> Shape:
    """What the layout's model has beside MODEL: a layer more than stages, so that they differ, but not less than three.

    A layer's collectives are those of the layer before.
    """
    stages = layout.pipeline * layout.chunks
    num_layers = sum(layout.layers_per_stage) if layout.layers_per_stage else max(3, stages + 1)
    return (("num_hidden_layers", num_layers), *layout.model)


@dataclass
class Run:
    """What training did, every tensor whole and under its global name."""

    losses: list[float]
    grad_norms: list[float]
    gradients: dict[str, Tensor] = field(default_factory=dict)  # of the first step
    weights: dict[str, Tensor] = field(default_factory=dict)  # after the last


def train(layout: Layout, steps: int = NUM_STEPS) -> Run:
    """Train on the pool's first ranks and put the parts together."""
    return put_together(pool.run(train_on_rank, layout.world_size, layout, steps))


@functools.cache
def trained(layout: Layout) -> Run:
    return train(layout)


def one_process(layout: Layout) -> Run:
    """What the layout's model does on one rank."""
    return trained(Layout(model=shape_of(layout)))


OnRank = tuple[Run, dict[str, list[tuple[Any, Tensor]]]]


def put_together(parts: list[OnRank]) -> Run:
    """One run, from what each rank says of it and the boxes that it owns."""
    run = parts[0][0]
    for name in ("gradients", "weights"):
        whole: dict[str, Tensor] = {}
        for other, pieces in parts:
            assert (other.losses, other.grad_norms) == (run.losses, run.grad_norms), (
                "every rank reports the same"
            )
            for box, value in pieces[name]:
                target = whole.setdefault(box.name, torch.full(box.shape, torch.nan))
                target[tuple(slice(a, a + n) for a, n in zip(box.offset, box.size, strict=True))] = value
        setattr(run, name, whole)
    return run


def train_on_rank(layout: Layout, steps: int, device: str = "cpu") -> OnRank:
    mesh = Mesh(layout.tensor, layout.pipeline, device)
    trainer = Trainer(settings(layout), mesh)
    trainer.initialize()
    return take_steps(trainer, lambda step: microbatches(layout, step, mesh.data_rank), steps)


def take_steps(trainer: Trainer, batches_of: Callable[[int], Sequence[Batch]], steps: int) -> OnRank:
    run, pieces = Run([], []), {}
    for step in range(steps):
        batches = [batch.to(trainer.mesh.device) for batch in batches_of(step)]
        result = trainer.step(batches, lr=LEARNING_RATE)
        run.losses.append(result.loss)
        run.grad_norms.append(result.grad_norm)
        if step == 0:
            pieces["gradients"] = owned_pieces(trainer, trainer.flat.gradients)
    pieces["weights"] = owned_pieces(trainer, trainer.optimizer.master)
    return run, pieces


def settings(layout: Layout) -> PretrainConfig:
    return PretrainConfig.model_validate_json(json.dumps(sections(layout) | {"loss": {}}))


def sections(layout: Layout) -> dict[str, Any]:
    """What the settings of every stage have."""
    return {
        "run": {"dir": "unused", "seed": 7},
        "model": {**MODEL, **dict(shape_of(layout))},
        "parallel": {
            "tensor": layout.tensor,
            "pipeline": layout.pipeline,
            "chunks": layout.chunks,
            "schedule": layout.schedule,
            "sequence": layout.sequence,
            "layers_per_stage": layout.layers_per_stage,
        },
        "zero": {
            "stage": layout.zero,
            "prefetch": layout.prefetch,
            "offload": "optimizer" if layout.offload else "none",
            "offload_fraction": layout.offload or 1.0,
        },
        "precision": {"compute": layout.compute, "moments": layout.moments},
        "recompute": layout.recompute,
        "data": {"train": [{"path": "unused"}], "sequence_length": SEQUENCE_LENGTH},
        "batch": {"global": GLOBAL_BATCH, "micro": layout.micro},
        "lora": {},
        "optim": {"lr": LEARNING_RATE},
        "kernels": {},
        "train": {"steps": 5},
        "checkpoint": {},
        "log": {},
        "generate": {},
    }


def microbatches(layout: Layout, step: int, data_rank: int) -> list[Microbatch]:
    """This data rank's share of a global batch that does not depend on the layout."""
    generator = random.Random(step)
    samples = [_sample(generator) for _ in range(GLOBAL_BATCH)]
    share = GLOBAL_BATCH // layout.data
    mine = samples[data_rank * share : (data_rank + 1) * share]
    return [collate(mine[i : i + layout.micro]) for i in range(0, share, layout.micro)]


def _sample(generator: random.Random) -> Window:
    # Low ids are more frequent, so that there is something to learn.
    ids = [int(VOCAB_SIZE * generator.random() ** 3) for _ in range(SEQUENCE_LENGTH + 1)]
    tokens = torch.tensor(ids)
    starts = sorted(generator.sample(range(1, SEQUENCE_LENGTH), generator.randrange(4)))
    return Window(tokens, [0, *starts], ends_document=generator.random() < 0.3)


def owned_pieces(trainer: Trainer, shards: list[Tensor]) -> list[tuple[Any, Tensor]]:
    """Boxes and values of flat tensors that this rank owns; of copies only the first data rank's."""
    if trainer.flat.replica_rank:
        return []
    return [(piece.box, view.clone()) for piece, view in trainer.flat.pieces(shards) if piece.owned]
