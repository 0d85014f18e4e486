"""Each process has a device of its own, the one that the settings ask for, or the run ends with one line."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from llm3d.errors import InputError
from llm3d.parallel.mesh import device_of_this_process

ROOT = Path(__file__).parents[2]


def machine(monkeypatch: pytest.MonkeyPatch, gpus: int, processes: int = 1, rank: int = 0) -> None:
    """Have torch see so many GPUs, and this process be one of so many of its machine."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    monkeypatch.setenv("LOCAL_RANK", str(rank))


@pytest.mark.parametrize(
    ("gpus", "processes", "wanted", "device"),
    [
        (0, 4, "auto", "cpu"),
        (0, 4, "cpu", "cpu"),
        (1, 1, "auto", "cuda"),
        (8, 8, "auto", "cuda"),
        (8, 2, "cuda", "cuda"),
        (8, 2, "cpu", "cpu"),
        (1, 2, "cpu", "cpu"),
    ],
)
def test_each_process_has_a_device_of_its_own(
    gpus: int, processes: int, wanted: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for rank in range(processes):
        machine(monkeypatch, gpus, processes, rank)
        found.append(device_of_this_process(wanted))
    assert {each.type for each in found} == {device}
    if device == "cuda":
        assert [each.index for each in found] == list(range(processes))


@pytest.mark.parametrize(
    ("gpus", "processes", "wanted", "said"),
    [
        (1, 2, "auto", "run.device: auto, but there are 2 processes on this machine and 1 GPU; "),
        (4, 8, "cuda", "run.device: cuda, but there are 8 processes on this machine and 4 GPUs; "),
        (0, 1, "cuda", "run.device: cuda, but there is no GPU that torch can use; "),
    ],
)
def test_what_a_machine_does_not_have_is_said_in_one_line_on_every_rank(
    gpus: int, processes: int, wanted: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for rank in range(processes):
        machine(monkeypatch, gpus, processes, rank)
        with pytest.raises(InputError) as raised:
            device_of_this_process(wanted)
        assert str(raised.value).startswith(said) and "\n" not in str(raised.value)


def test_a_launcher_that_does_not_count_processes_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, gpus=2, rank=2)
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    with pytest.raises(InputError, match="3 processes on this machine and 2 GPUs"):
        device_of_this_process()


@pytest.mark.parametrize(("gpus", "on_cpu"), [(0, False), (1, True), (2, False), (8, False)])
@pytest.mark.parametrize("script", ["demo", "demo_chat"])
def test_a_demo_runs_on_any_machine(
    script: str, gpus: int, on_cpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, gpus)
    monkeypatch.syspath_prepend(str(ROOT / "launch"))
    names: dict[str, Any] = runpy.run_path(str(ROOT / "launch" / f"{script}.py"))
    with mock.patch.dict(names["run_on"].__globals__, run=mock.Mock()) as patched:
        names["run_on"](2, "pretrain CONFIG.yaml")
        (command,) = patched["run"].call_args.args
    assert command == "launch/torchrun.sh 2 pretrain CONFIG.yaml" + " run.device=cpu" * on_cpu
