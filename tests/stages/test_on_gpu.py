"""A GPU writes what a CPU writes, and learns the same from rewards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llm3d.parallel.mesh import Mesh
from llm3d.stages.run import train_task
from tests.gpu import RUNS_ON_GPU
from tests.stages.common import Settings, examples, metrics, silent
from tests.stages.post_training import (
    answer,
    opened_task,
    question,
    settings,
    write_model,
    write_reward_model,
    write_rows,
)

pytestmark = RUNS_ON_GPU


def trained(directory: Path, device: str, **changes: Any) -> Settings:
    """Two steps of PPO, whose reference and reward model are offloaded."""
    given = settings(directory / "model", str(directory / "prompts.jsonl"), directory / device, **changes)
    given["optim"] = {"lr": 1e-3}
    given["train"] = {"steps": 2}
    given["generate"] = {"max_new_tokens": 12}
    given["ppo"] = {"rewards": [{"model": str(directory / "reward")}], "epochs": 2, **changes.get("ppo", {})}
    with silent():
        train_task(opened_task("ppo", given), Mesh(device=device))
    return given


@pytest.mark.parametrize(
    "changes", [{}, {"lora": {"rank": 3}}, {"zero": {"stage": 1, "offload": "optimizer"}}]
)
def test_ppo_on_a_gpu_is_that_of_the_cpu(changes: dict[str, Any], tmp_path: Path) -> None:
    """In fp32: the same replies, and nearly the same numbers."""
    torch.backends.cuda.matmul.allow_tf32 = False
    model = write_model(tmp_path / "model")
    write_reward_model(tmp_path / "reward", model)
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": question(i), "want": answer(i)} for i in range(8)])
    ours, theirs = (trained(tmp_path, device, **changes) for device in ("cuda", "cpu"))
    assert [e["reply"] for e in examples(ours)] == [e["reply"] for e in examples(theirs)]
    for line, expected in zip(metrics(ours), metrics(theirs), strict=True):
        for name in ("loss", "grad_norm", "objective/scores", "objective/kl", "loss/value_avg"):
            assert line[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-5)
        assert line["rollout/log_probability_gap"] < 1e-4 and "memory_gib/gen" in line
