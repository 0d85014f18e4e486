"""A checkpoint of an earlier version goes on under this one; `earlier/` holds it, its data and what came next."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from llm3d.cli import app
from tests.closeness import assert_same_tensors

EARLIER = Path(__file__).parent / "earlier"


def test_a_checkpoint_of_an_earlier_version_goes_on_as_it_did_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the processor that wrote it the weights are the same to the bit; another one rounds otherwise."""
    for name in ("train.bin", "train.idx", "run.yaml"):
        shutil.copy(EARLIER / name, tmp_path)
    shutil.copytree(EARLIER / "step-00000002", tmp_path / "run" / "checkpoints" / "step-00000002")
    monkeypatch.chdir(tmp_path)
    ended = CliRunner().invoke(app, ["pretrain", "run.yaml"])
    assert ended.exit_code == 0, ended.output
    ours, theirs = (
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][-2:]
        for folder in (tmp_path / "run", EARLIER)
    )
    for line, expected in zip(ours, theirs, strict=True):
        for name in ("step", "samples", "tokens", "loss", "grad_norm", "lr"):
            assert line[name] == pytest.approx(expected[name], rel=1e-5), name
    weights = load_file(tmp_path / "run" / "checkpoints" / "step-00000004" / "model" / "model.safetensors")
    assert_same_tensors(weights, load_file(EARLIER / "after-step-4.safetensors"))
