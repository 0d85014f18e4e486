"""On a GPU: steps that are recorded write what steps write, and both what a CPU writes."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from llm3d.generate.engine import Generator
from llm3d.generate.replay import recorder
from llm3d.parallel.mesh import Mesh
from llm3d.train.trainer import Evaluator
from tests.generate.test_engine import MODELS, SHAPE, Call, drawn, told_as_written
from tests.gpu import RUNS_ON_GPU
from tests.models.layouts import Layout, config_for

pytestmark = RUNS_ON_GPU


def written(path: Path, device: str, graphs: bool) -> list[list[int]]:
    mesh = Mesh(device=device)
    model = Evaluator(config_for(path, Layout()), mesh)
    model.initialise()
    record = recorder(mesh.device, graphs)
    assert (record is not None) == graphs
    generator = Generator(model.config.model, model.stages, mesh, model.dtype, record)
    return [reply.tokens for several in told_as_written(generator, Call(drawn(), 5)) for reply in several]


def test_recorded_steps_write_what_steps_write(tmp_path: Path) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **SHAPE, **MODELS["llama-2"]}))
    expected = written(tmp_path, "cpu", graphs=False)
    assert written(tmp_path, "cuda", graphs=False) == expected
    assert written(tmp_path, "cuda", graphs=True) == expected
