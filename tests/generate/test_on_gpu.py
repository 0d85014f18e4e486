"""On a GPU: steps that are recorded write what steps write, and both what a CPU writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from llm3d.generate.cuda_graphs import graphs_for
from llm3d.generate.engine import Generator, Reply
from llm3d.parallel.mesh import Mesh
from llm3d.train.trainer import ShardedModel
from tests.generate.harness import MODELS, SHAPE, Call, drawn, told_as_written
from tests.gpu import RUNS_ON_GPU
from tests.models.layouts import Layout, config_for

pytestmark = RUNS_ON_GPU


def written(path: Path, device: str, graphs: bool) -> list[Reply]:
    """Of two calls of one generator."""
    mesh = Mesh(device=device)
    model = ShardedModel(config_for(path, Layout()), mesh)
    model.initialize()
    recorder = graphs_for(mesh.device, graphs)
    assert (recorder is not None) == graphs
    generator = Generator(model.config.model, model.stages, mesh, model.dtype, recorder)
    calls = Call(drawn(), 5), Call(drawn(12)[::-1], 7)
    return [reply for call in calls for several in told_as_written(generator, call) for reply in several]


def test_recorded_steps_write_what_steps_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **SHAPE, **MODELS["llama-2"]}))
    played: list[int] = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: (played.append(1), replay(graph)))
    expected = written(tmp_path, "cpu", graphs=False)
    for graphs in (False, True):
        for reply, wanted in zip(written(tmp_path, "cuda", graphs), expected, strict=True):
            assert reply.tokens == wanted.tokens
            assert reply.log_probabilities == pytest.approx(wanted.log_probabilities, abs=1e-4)
        assert (len(played) > 10) == graphs
