"""Where a model's weights come from: a run's latest checkpoint, what the settings name, or chance."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llm3d.checkpoint.load import (
    check_model,
    load_adapters,
    load_checkpoint,
    load_pretrained,
    load_weights,
)
from llm3d.config import Config
from llm3d.config.explain import show
from llm3d.config.places import latest_checkpoint
from llm3d.errors import InputError
from llm3d.parallel.collectives import gather_bytes
from llm3d.parallel.mesh import Mesh
from llm3d.train.objective import Objective
from llm3d.train.trainer import Evaluator, Trainer


def first_state(trainer: Trainer, checkpoint: Path | None) -> tuple[dict[str, Any], str]:
    """Give the model its first weights; -> the checkpoint's state ({} without one) and where they came from."""
    if checkpoint is None:
        return {}, load_first_weights(trainer)
    if trainer.flat.frozen:
        load_first_weights(trainer)
    return load_checkpoint(checkpoint, trainer), str(checkpoint)


def load_first_weights(model: Evaluator) -> str:
    """Those that the settings name, or random ones; -> where they came from."""
    return load_model(model, model.config.lora.path)


def load_model(model: Evaluator, adapters: str | None) -> str:
    """The weights that the settings name, with these adapters, PEFT's or a checkpoint's; -> where they came from."""
    config = model.config
    if config.model.path is None:
        model.initialise()
        return f"random weights, seed {config.run.seed}"
    load_pretrained(Path(config.model.path), model, Path(adapters) if adapters else None)
    return config.model.path + (f" and {adapters}" if adapters else "")


def load_first_adapters(model: Evaluator) -> None:
    """The adapters alone that training goes on from, if there are any; new ones start as nothing."""
    if model.config.lora.path:
        load_adapters(Path(model.config.lora.path), model)


def latest_model(
    config: Config,
    mesh: Mesh,
    objective: Objective,
    prepare: Callable[[Evaluator], None] = lambda model: None,
) -> tuple[Evaluator, str]:
    """A run's model with the weights of its latest checkpoint, else those it starts from; and where they came from.

    prepare: called before they are loaded.
    """
    checkpoint = checkpoint_to_resume(config, Path(config.run.dir), mesh)
    if checkpoint is None and config.model.path is None:
        raise InputError(
            f"run.dir: {config.run.dir} has no checkpoint; train first, or name one with "
            "checkpoint.resume=PATH or model.path=PATH"
        )
    model = Evaluator(config, mesh, objective)
    if checkpoint is not None:
        check_model(checkpoint, model)
    prepare(model)
    if checkpoint is None or config.lora.rank:
        return model, load_model(model, str(checkpoint) if checkpoint else config.lora.path)
    load_weights(checkpoint, model)
    return model, str(checkpoint)


def checkpoint_to_resume(config: Config, run_dir: Path, mesh: Mesh) -> Path | None:
    """What checkpoint.resume names: the run directory's latest checkpoint, none, or a path. Called on all ranks.

    Raises InputError on all of them where they were not given the same weights.
    """
    _check_same_weights(config, mesh)
    if config.checkpoint.resume == "auto":
        return latest_on_first_rank(run_dir, mesh)
    return None if config.checkpoint.resume == "none" else Path(config.checkpoint.resume)


def _check_same_weights(config: Config, mesh: Mesh) -> None:
    """Raise InputError, on every rank, where the settings of two ranks name different weights or tokenizers."""
    named = {
        "model.path": config.model.path,
        "lora.path": config.lora.path,
        "checkpoint.resume": config.checkpoint.resume,
        "data.tokenizer": config.data.tokenizer,
    }
    everyones = [json.loads(theirs) for theirs in gather_bytes(json.dumps(named).encode(), mesh.everyone)]
    for rank, theirs in enumerate(everyones):
        for name, first in everyones[0].items():
            if theirs[name] != first:
                raise InputError(
                    f"{name}: {show(first)} on rank 0, {show(theirs[name])} on rank {rank}: their hosts see different "
                    "files; mount the same directory on all, or name what is there on all"
                )


def latest_on_first_rank(run_dir: Path, mesh: Mesh) -> Path | None:
    """The latest checkpoint that rank 0 sees, on every rank: hosts may see a shared directory differently."""
    latest = gather_bytes(str(latest_checkpoint(run_dir) or "").encode(), mesh.everyone)[0].decode()
    return Path(latest) if latest else None


def seen_by_first_rank(path: Path, mesh: Mesh) -> bool:
    """Whether there is such a file, the same answer on every rank."""
    return gather_bytes(str(path.exists()).encode(), mesh.everyone)[0] == b"True"
