"""No stage uses an operation that raises on a GPU under deterministic algorithms."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llm3d.config import PPOConfig, make_config
from llm3d.kernels import backend
from llm3d.parallel.mesh import Mesh
from llm3d.stages.stage import stage_of
from tests.generate.drawing import CASES, drawn
from tests.paper import NEEDS_KERNELS, step_on_paper
from tests.parity.harness import Layout
from tests.parity.harness import settings as settings_of_pretraining
from tests.parity.stage_settings import STAGE_SETTINGS
from tests.parity.stage_settings import settings as settings_of_stage
from tests.stages import common
from tests.stages.common import Settings, trained_model, write_corpus
from tests.stages.post_training import (
    comparisons,
    conversations,
    question,
    settings,
    train_on_rank,
    write_model,
    write_reward_model,
    write_rows,
)
from tests.throwing import DOCUMENTED, Deterministic, documented_by_torch

ROWS = {
    "sft": conversations(6),
    "reward": comparisons(6),
    "dpo": comparisons(6),
    "ppo": [{"prompt": question(i)} for i in range(4)],
}


def test_all_that_torch_documents_is_known_here() -> None:
    names = documented_by_torch()
    assert len(names) > 20 and set(names) <= set(DOCUMENTED)
    operations = {name.partition(".")[0] for name in torch._C._dispatch_get_all_op_names()}
    assert {f"aten::{name}" for dispatched, _ in DOCUMENTED.values() for name in dispatched} <= operations


@pytest.mark.parametrize(
    ("operation", "raises"),
    [
        (lambda x: x.cumsum(0), True),
        (lambda x: x.long().cumsum(0), False),
        (lambda x: x.long().cumsum(0, dtype=torch.float64), True),
        (lambda x: x.median(0), True),
        (lambda x: x.median(), False),
        (lambda x: x.long().bincount(x), True),
        (lambda x: x.long().bincount(), False),
        (lambda x: x.put_(x.long(), x), True),
        (lambda x: x.scatter_reduce(0, x.long(), x, "prod"), True),
        (lambda x: x.scatter_reduce(0, x.long(), x, reduce="sum"), False),
        (lambda x: x.clone().resize_(2), False),
    ],
)
def test_what_raises_is_found(operation: Callable[[Tensor], object], raises: bool) -> None:
    x = torch.arange(4.0)
    with Deterministic():
        if raises:
            with pytest.raises(AssertionError, match="raises on a GPU"):
                operation(x)
        else:
            operation(x)


def given_settings(stage: str, directory: Path) -> Settings:
    """Two steps."""
    if stage == "pretrain":
        for name in ("train", "valid"):
            write_corpus(directory / name, 400)
        given = common.settings(directory)
    else:
        model = write_model(directory / "model")
        write_reward_model(directory / "reward", model)
        given = settings(model, write_rows(directory / "rows.jsonl", ROWS[stage]), directory / "run")
    given["train"] = {"steps": 2}
    if stage == "ppo":
        given["ppo"] = {"rewards": [{"model": str(directory / "reward")}], "entropy_coefficient": 0.1}
        given["ppo"] |= {"whiten_rewards": True, "ema": 0.5}
        given["generate"] = {"max_new_tokens": 5, "num_replies": 2, "temperature": 0.9}
        given["generate"] |= {"top_k": 100, "top_p": 0.95, "min_p": 0.01}
    return given


@pytest.mark.usefixtures("world_of_one")
@pytest.mark.parametrize("name", CASES)
def test_drawing_a_token_uses_nothing_that_raises(name: str) -> None:
    with Deterministic():
        drawn(CASES[name], torch.tensor([0.3]), Mesh().tensor)


@pytest.mark.usefixtures("world_of_one")
@pytest.mark.parametrize("stage", ["pretrain", *ROWS])
def test_a_run_uses_nothing_that_raises(stage: str, tmp_path: Path) -> None:
    """In plain PyTorch, which computes what a library of kernels else would."""
    given = given_settings(stage, tmp_path)
    given["kernels"] = {"backend": "reference"}
    with backend.using("reference"), Deterministic():
        if stage == "pretrain":
            common.pretrain_on_rank(given)
        else:
            train_on_rank(stage, given)
    assert len(common.metrics(given)) == 2


@NEEDS_KERNELS
@pytest.mark.parametrize("stage", ["pretrain", *STAGE_SETTINGS])
def test_a_step_as_a_gpu_takes_it_uses_nothing_that_raises(stage: str) -> None:
    few = (("num_hidden_layers", 2),)  # of which each does what the other does
    for layout in (
        Layout(micro=2, compute="bf16", recompute="selective", model=few),
        Layout(tensor=2, data=2, zero=3, model=few),
    ):
        config = settings_of_pretraining(layout) if stage == "pretrain" else settings_of_stage(stage, layout)
        role = trained_model(config)
        step_on_paper(config, role.objective, role.microbatch, layout.world_size, watched=Deterministic())


@NEEDS_KERNELS
def test_a_step_of_ppo_as_a_gpu_takes_it_uses_nothing_that_raises(tmp_path: Path) -> None:
    config = make_config(given_settings("ppo", tmp_path), 1, PPOConfig)
    trained = [role for role in stage_of(config).models(config).roles if role.kind == "trained"]
    assert len(trained) == 2
    for role in trained:
        step_on_paper(role.config, role.objective, role.microbatch, watched=Deterministic())
