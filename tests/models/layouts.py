"""A model in a Hugging Face directory, under a layout."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from llm3d.config import PretrainConfig, make_config


class Layout(NamedTuple):
    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    sequence: bool = False
    chunks: int = 1
    zero: int = 0

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.data


def config_for(path: Path, layout: Layout) -> PretrainConfig:
    """Settings with which the directory's model is built."""
    parallel = {
        "tensor": layout.tensor,
        "pipeline": layout.pipeline,
        "sequence": layout.sequence,
        "chunks": layout.chunks,
        "schedule": "interleaved" if layout.chunks > 1 else "1f1b",
    }
    given = {
        "run": {"dir": "unused"},
        "model": {"path": str(path)},
        "parallel": parallel,
        "zero": {"stage": layout.zero},
        "data": {"train": ["unused"], "sequence_length": 64},
        "batch": {"global": 24},
        "optim": {"lr": 1e-3},
        "train": {"steps": 1},
    }
    return make_config(given, layout.world_size)
