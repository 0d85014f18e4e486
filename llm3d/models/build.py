"""From settings to this rank's part of a model, with storage and first weights."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable

import torch
from torch import Tensor

from llm3d.config import LoRASettings, ModelConfig, ParallelConfig
from llm3d.models.decoder import DecoderStage
from llm3d.models.family import Build, Family, key_value_replicas
from llm3d.models.heads import SCORE, HeadName
from llm3d.models.llama import LLAMA
from llm3d.models.qwen3 import QWEN3
from llm3d.parallel.boxes import Box, Piece
from llm3d.parallel.collectives import is_alone
from llm3d.parallel.mesh import Mesh
from llm3d.parallel.schedules import Schedule

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FAMILIES: dict[str, Family] = {"llama": LLAMA, "qwen3": QWEN3}  # by the model_type of a config.json
_BLOCK_ROWS = 64


def build_stages(
    config: ModelConfig,
    parallel: ParallelConfig,
    mesh: Mesh,
    recompute: str = "none",
    head: HeadName = "language",
    lora: LoRASettings | None = None,
) -> list[DecoderStage]:
    """This rank's stages, in the order of its chunks, without storage."""
    placement = Schedule.of(parallel).placement
    counts = parallel.layers_per_stage or spread_layers(config.num_hidden_layers, placement.num_stages)
    build = Build(
        config,
        mesh,
        parallel.sequence and not is_alone(mesh.tensor),
        recompute,
        lora or LoRASettings(),
        key_value_replicas(config, mesh),
    )
    stages = []
    for chunk in range(placement.num_chunks):
        stage = placement.stage_of(mesh.pipeline_rank, chunk)
        start = sum(counts[:stage])
        layers = range(start, start + counts[stage])
        stages.append(DecoderStage(build, FAMILIES[config.architecture.model_type], layers, head))
    return stages


def spread_layers(num_layers: int, num_stages: int) -> list[int]:
    """Layers a virtual stage, as even as possible; the middle stages get the odd ones.

    The first and the last stage also have the embedding and the head.
    """
    counts = [num_layers // num_stages] * num_stages
    middle_first = sorted(range(num_stages), key=lambda stage: abs(2 * stage - (num_stages - 1)))
    for stage in middle_first[: num_layers % num_stages]:
        counts[stage] += 1
    return counts


def initialize(weights: Iterable[tuple[Piece, Tensor]], config: ModelConfig, seed: int) -> None:
    """Fill them with random values that no layout changes."""
    for piece, view in weights:
        view.copy_(initial_value(piece.box, config, seed))


def initial_value(box: Box, config: ModelConfig, seed: int) -> Tensor:
    """fp32 first weights of a box: norms one, biases zero, the rest normal with the family's standard deviation.

    Each block of rows of a global tensor has its own stream, keyed by seed, name and block, so that
    a rank draws only the rows it holds.
    """
    if box.name.endswith(".bias"):
        return torch.zeros(box.size)
    if len(box.shape) == 1:
        return torch.ones(box.size)
    if box.name.endswith(".lora_B.weight"):
        return torch.zeros(box.size)
    std = FAMILIES[config.architecture.model_type].initial_std(box.name, config)
    if box.name.endswith(".lora_A.weight"):
        std = 1 / math.sqrt(3 * box.shape[1])  # the variance of PEFT's uniform first values
    if box.name == SCORE:
        std = 1 / math.sqrt(config.hidden_size + 1)  # Huang et al. 2024, N+ implementation details of RLHF
    first, last = box.offset[0] // _BLOCK_ROWS, -(-(box.offset[0] + box.size[0]) // _BLOCK_ROWS)
    blocks = [_random_block(box, block, seed) for block in range(first, last)]
    start = box.offset[0] - first * _BLOCK_ROWS
    columns = slice(box.offset[1], box.offset[1] + box.size[1])
    return torch.cat(blocks)[start : start + box.size[0], columns] * std


def _random_block(box: Box, block: int, seed: int) -> Tensor:
    key = hashlib.blake2b(f"{seed}/{box.name}/{block}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key, "little", signed=True))
    rows = min(_BLOCK_ROWS, box.shape[0] - block * _BLOCK_ROWS)
    return torch.randn(rows, box.shape[1], generator=generator)
