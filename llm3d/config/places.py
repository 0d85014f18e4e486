"""What a path on the command line is: a settings file, a run directory, a checkpoint, or a model alone.

Imports no torch: which checkpoint is meant is known before anything is started.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from llm3d.errors import InputError

MANIFEST = "manifest.json"  # written last: a checkpoint that has it is complete
_COMPLETE = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Place:
    """What a path names; None for what it does not.

    settings: a YAML file, the user's or a run's config.yaml.  run_dir: where that run writes.
    checkpoint: a complete one.  model: a Hugging Face or PEFT directory that is in no checkpoint.
    """

    settings: Path | None = None
    run_dir: Path | None = None
    checkpoint: Path | None = None
    model: Path | None = None


def place_of(path: str | Path) -> Place:
    """What a path names; what is no directory counts as a settings file. Raises InputError."""
    path = Path(path)
    if not path.is_dir():
        return Place(settings=path)
    checkpoint = path.parent if path.name in ("model", "adapter") and is_checkpoint(path.parent) else path
    if is_checkpoint(checkpoint):
        run_dir = _run_of(checkpoint)
        return Place(run_dir and _settings_in(run_dir), run_dir, checkpoint)
    if (path / "config.json").is_file() or (path / "adapter_config.json").is_file():
        return Place(model=path)
    run_dir = path.parent if path.name == "checkpoints" else path
    if _settings_in(run_dir) is None and not complete_checkpoints(run_dir):
        raise InputError(
            f"{path}: no run directory (it has no config.yaml and no complete checkpoint), no checkpoint (no "
            f"{MANIFEST}) and no Hugging Face directory (no config.json, no adapter_config.json)"
        )
    return Place(_settings_in(run_dir), run_dir, latest_checkpoint(run_dir))


def is_checkpoint(path: Path) -> bool:
    return (path / MANIFEST).is_file()


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The complete checkpoint of the highest step in a run directory."""
    return next(reversed(complete_checkpoints(run_dir)), None)


def complete_checkpoints(run_dir: Path) -> list[Path]:
    """By step."""
    checkpoints = Path(run_dir) / "checkpoints"
    if not checkpoints.is_dir():
        return []
    paths = [path for path in checkpoints.iterdir() if _COMPLETE.fullmatch(path.name)]
    return sorted(filter(is_checkpoint, paths), key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def _run_of(checkpoint: Path) -> Path | None:
    """The run directory that a checkpoint, or what a link to it means, lies in."""
    for path in (checkpoint, Path(os.path.abspath(checkpoint)), checkpoint.resolve()):
        if path.parent.name == "checkpoints":
            return path.parent.parent
    return None


def _settings_in(run_dir: Path) -> Path | None:
    return run_dir / "config.yaml" if (run_dir / "config.yaml").is_file() else None
