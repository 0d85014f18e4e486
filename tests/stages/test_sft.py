"""What fine-tuning says of the model after each evaluation."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests import pool
from tests.commands.generating import generate
from tests.stages.common import Settings
from tests.stages.post_training import conversations, settings, train_on_rank, write_model, write_rows

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "tensor and data": (4, {"parallel": {"tensor": 2, "sequence": True}, "zero": {"stage": 3}}),
    "interleaved": (2, {"parallel": {"pipeline": 2, "chunks": 2, "schedule": "interleaved"}}),
    "adapters": (
        2,
        {"parallel": {"pipeline": 2}, "lora": {"rank": 2, "dropout": 0.5}, "optim": {"lr": 1e-9}},
    ),
}
REMARK = re.compile(r"step (\d+): to \.\.\.'.*?' it replies (.*)")


@pytest.fixture
def given(tmp_path: Path) -> Settings:
    model = write_model(tmp_path / "model", initializer_range=0.3)
    made = settings(model, write_rows(tmp_path / "train.jsonl", conversations(9)), tmp_path / "run")
    made["data"]["valid"] = [write_rows(tmp_path / "valid.jsonl", conversations(3)[::-1])]
    made |= {"train": {"steps": 2, "eval_every": 1}, "optim": {"lr": 1e-9}, "sft": {"sample_tokens": 9}}
    return made


def remarks(given: Settings, world_size: int = 1) -> list[tuple[str, str]]:
    """Of the first rank, which alone speaks: the step, and the reply."""
    said, *others = pool.run(train_on_rank, world_size, "sft", given)
    assert not any(map(REMARK.search, others))
    return REMARK.findall(said)


def test_every_layout_shows_the_same_reply(given: Settings, tmp_path: Path) -> None:
    """And it is the one that the saved model writes."""
    found = {
        name: remarks(given | changes | {"run": {"dir": str(tmp_path / name)}}, world_size)
        for name, (world_size, changes) in LAYOUTS.items()
    }
    assert [step for step, _ in found["one process"]] == ["1", "2"]
    assert all(said == found["one process"] for said in found.values())
    prompt = write_rows(tmp_path / "prompt.jsonl", conversations(3)[::-1][:1])
    words = ("generate.temperature=0", "generate.max_new_tokens=9", "--prompts", prompt)
    shown = generate(given | {"run": {"dir": str(tmp_path / "one process")}}, tmp_path, *words).stdout
    assert ast.literal_eval(found["one process"][-1][1]) == json.loads(shown)["reply"]


@pytest.mark.parametrize(
    "changes", [{"sft": {"sample_tokens": 0}}, {"sft": {"prompt_loss": True}}], ids=["not asked", "no prompt"]
)
def test_without_a_prompt_nothing_is_shown(given: Settings, changes: dict[str, Any]) -> None:
    assert remarks(given | changes) == []
