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
    read_state,
)
from llm3d.config import Config
from llm3d.config.explain import show
from llm3d.config.places import latest_checkpoint
from llm3d.errors import InputError
from llm3d.parallel.agreement import input_errors_on_all
from llm3d.parallel.collectives import gather_bytes
from llm3d.parallel.mesh import Mesh
from llm3d.train.learner import Learner
from llm3d.train.trainer import ShardedModel


def start(learner: Learner, checkpoint: Path | None) -> tuple[dict[str, Any], str]:
    """Give what is trained its first weights, or a checkpoint's; -> the latter's state, else {}, and where they came
    from.
    """
    if checkpoint is None:
        return {}, load_first_weights(learner.model)
    if learner.trainer.flat.frozen:
        load_first_weights(learner.model)
    state = load_checkpoint(checkpoint, learner.trainer, learner.others)
    learner.restore(state)
    return state, str(checkpoint)


def load_first_weights(model: ShardedModel) -> str:
    """Those that the settings name, or random ones; -> where they came from."""
    return load_model(model, model.config.lora.path)


def load_model(model: ShardedModel, adapters: str | None) -> str:
    """The weights that the settings name, with these adapters, PEFT's or a checkpoint's; -> where they came from."""
    config = model.config
    if config.model.path is None:
        model.initialize()
        return f"random weights, seed {config.run.seed}"
    load_pretrained(Path(config.model.path), model, Path(adapters) if adapters else None)
    return config.model.path + (f" and {adapters}" if adapters else "")


def load_first_adapters(model: ShardedModel) -> None:
    """The adapters alone that training goes on from, if there are any; new ones start as nothing."""
    if model.config.lora.path:
        load_adapters(Path(model.config.lora.path), model)


def latest_checkpoint_or_start(config: Config, mesh: Mesh) -> Path | None:
    """What a run's model is used from: its latest checkpoint; None: what model.path names, where there is none.

    Raises InputError where there is neither.
    """
    checkpoint = checkpoint_to_resume(config, Path(config.run.dir), mesh)
    if checkpoint is None and config.model.path is None:
        raise InputError(
            f"run.dir: {config.run.dir} has no checkpoint; train first, or name one with "
            "checkpoint.resume=PATH or model.path=PATH"
        )
    return checkpoint


def load_latest(
    model: ShardedModel, checkpoint: Path | None, prepare: Callable[[], None] = lambda: None
) -> tuple[str, dict[str, Any]]:
    """Load the weights of a model that is used and not trained; -> where they came from, and the checkpoint's state.

    checkpoint: see `latest_checkpoint_or_start`; without one the state is {}.  prepare: called when it has proved to be
    of this model.
    """
    if checkpoint is None:
        prepare()
        return load_first_weights(model), {}
    check_model(checkpoint, model)
    prepare()
    with input_errors_on_all(model.mesh.everyone):
        state = read_state(checkpoint)
    if model.config.lora.rank:
        return load_model(model, str(checkpoint)), state
    load_weights(checkpoint, model)
    return str(checkpoint), state


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
