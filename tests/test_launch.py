"""What the launchers start, and with which environment; torchrun and Slurm are played."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parent.parent / "launch"
CHOSEN = {
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    "CUDA_DEVICE_MAX_CONNECTIONS": "32",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    "TORCH_NCCL_TRACE_BUFFER_SIZE": "20000",
}
NOTES_DOWN = f"""#!{sys.executable}
import json, os, sys
with open(os.environ["NOTES"], "a") as notes:
    print(json.dumps([sys.argv[1:], dict(os.environ)]), file=notes)
"""
SRUN = """#!/usr/bin/env bash
echo "$*" > "$NOTES.srun"
while [[ $1 == --* ]]; do shift; done
for task in 0 1; do SLURM_PROCID=$((task + 6)) SLURM_LOCALID=$task "$@"; done
"""


def started(
    script: str, arguments: list[str], directory: Path, **environment: str
) -> list[tuple[list[str], dict[str, str]]]:
    """The arguments and the environment of each Python that a launcher starts."""
    programs = {"python": NOTES_DOWN, "srun": SRUN, "scontrol": "#!/usr/bin/env bash\nprintf 'n1\\nn2\\n'\n"}
    for name, text in programs.items():
        (directory / name).write_text(text)
        (directory / name).chmod(0o755)
    inherited = {name: value for name, value in os.environ.items() if name not in CHOSEN}
    path = f"{directory}{os.pathsep}{os.environ['PATH']}"
    notes = directory / "notes"
    subprocess.run(
        ["bash", str(LAUNCH / script), *arguments],
        check=True,
        env={**inherited, "PATH": path, "PYTHON": "python", "NOTES": str(notes), **environment},
    )
    return [tuple(json.loads(line)) for line in notes.read_text().splitlines()]


SLURM = {
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_JOB_ID": "20007",
    "SLURM_NTASKS": "8",
    "SLURM_NTASKS_PER_NODE": "4",
}


def test_torchrun_starts_what_was_checked(tmp_path: Path) -> None:
    check, launch = started("torchrun.sh", ["4", "sft", "a.yaml", "run.dir=b"], tmp_path)
    assert check[0] == ["-m", "llm3d", "sft", "a.yaml", "run.dir=b", "--check"]
    assert check[1]["WORLD_SIZE"] == "4"
    assert launch[0][:2] == ["-m", "torch.distributed.run"]
    assert launch[0][-5:] == ["-m", "llm3d", "sft", "a.yaml", "run.dir=b"]
    assert launch[1].items() >= CHOSEN.items()
    assert launch[1]["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "600"


def test_slurm_gives_each_task_its_place_and_its_cores(tmp_path: Path) -> None:
    tasks = started("slurm.sbatch", ["pretrain", "a.yaml", "run.dir=a b"], tmp_path, **SLURM)
    assert "--cpu-bind=none" in (tmp_path / "notes.srun").read_text()
    for number, (arguments, environment) in enumerate(tasks):
        assert arguments == ["-m", "llm3d", "pretrain", "a.yaml", "run.dir=a b"]
        expected = {
            "RANK": str(number + 6),
            "LOCAL_RANK": str(number),
            "WORLD_SIZE": "8",
            "LOCAL_WORLD_SIZE": "4",
            "MASTER_ADDR": "n1",
            "MASTER_PORT": "20007",
        }
        assert environment.items() >= (CHOSEN | expected).items()


@pytest.mark.parametrize(("script", "slurm"), [("torchrun.sh", {}), ("slurm.sbatch", SLURM)])
def test_what_the_user_has_set_is_left(script: str, slurm: dict[str, str], tmp_path: Path) -> None:
    mine = {"PYTORCH_CUDA_ALLOC_CONF": "backend:native", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    arguments = ["2", "pretrain", "a.yaml"] if script == "torchrun.sh" else ["pretrain", "a.yaml"]
    _, environment = started(script, arguments, tmp_path, **mine, **slurm)[-1]
    assert environment["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
    assert environment["PYTORCH_ALLOC_CONF"] == "backend:native"
