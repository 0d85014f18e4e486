"""Reading checkpoints and Hugging Face directories, under any layout."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from llm3d.checkpoint import manifest
from llm3d.checkpoint.box_files import BoxReader, StoredBox
from llm3d.checkpoint.hugging_face import all_names, read_weights
from llm3d.checkpoint.manifest import Manifest, read_manifest
from llm3d.checkpoint.peft import read_adapter
from llm3d.checkpoint.save import ALONE
from llm3d.errors import InputError
from llm3d.files import read_json
from llm3d.models.build import initialize
from llm3d.models.heads import SCORE
from llm3d.parallel.agreement import input_errors_on_all
from llm3d.parallel.boxes import Box, Piece
from llm3d.train import meaning
from llm3d.train.trainer import ShardedModel, Trainer

_INSTEAD = {
    "model": "holds adapters and no whole model; set lora as it was, or let `llm3d export` merge them",
    "adapter": "holds a whole model and no adapters",
}
_OTHER_MODEL = "set model as it was when this was saved, or name another run.dir"


def step_of_checkpoint(path: Path, trainer: Trainer, others: Mapping[str, Trainer] = ALONE) -> int:
    """After which step it was saved. Called on all ranks; its weights are not read.

    Raises InputError, the same on every rank, for a checkpoint that the trainer cannot go on from: of another model,
    or with settings without which it means something else.
    """
    for folder, other in others.items():
        _check_other(path, folder, other)
    return _fitting_manifest(path, trainer).step


def _check_other(path: Path, folder: str, trainer: Trainer) -> None:
    try:
        _fitting_manifest(path / folder, trainer)
    except InputError as error:
        raise InputError(f"of the {folder}, {error}") from None


def check_model(path: Path, model: ShardedModel) -> None:
    """Raise InputError, the same on every rank, where a checkpoint was made with other settings. Called on all ranks.

    Of a ShardedModel only what the model computes counts; of a Trainer all that it goes on with.
    """
    with input_errors_on_all(model.mesh.everyone):
        if model.mesh.rank == 0:
            meaning.check_meaning(path, model.config, model.meaning if isinstance(model, Trainer) else None)


def load_checkpoint(path: Path, trainer: Trainer, others: Mapping[str, Trainer] = ALONE) -> dict[str, Any]:
    """Continue from a checkpoint, whatever layout and precision saved it: fill weights and moments; -> its state.

    Called on all ranks. Each rank first checks its share of the checksums, then reads the boxes it holds.
    A run in bf16 takes the weights of one in fp32 as its master weights; a run in fp32 takes over the master
    weights. Raises InputError, the same on every rank, for a checkpoint that is damaged or of another model.
    """
    path, optimizer, flat = Path(path), trainer.optimizer, trainer.flat
    contents = _checked_manifest(path, trainer)
    with input_errors_on_all(trainer.mesh.everyone):
        reader = BoxReader(path)
        for name, values in {**optimizer.state, "master": optimizer.master}.items():
            for piece, view in flat.pieces(values):
                reader.read(*_source(contents, name, piece), view)
        state = read_state(path)
    optimizer.copy_to_parameters()
    optimizer.set_steps_taken(contents.optimizer_steps)
    trainer.restore(state)
    for folder, other in others.items():
        load_checkpoint(path / folder, other)
    return state


def read_state(path: Path) -> dict[str, Any]:
    """What training changes beside weights and optimizer state. Raises InputError for a damaged checkpoint."""
    file = path / "state.json"
    if not file.is_file():
        raise InputError(f"{file}: missing; this is not a whole checkpoint")
    return read_json(file)


def load_weights(path: Path, model: ShardedModel) -> None:
    """Take the weights of a checkpoint of this very model, all of whose weights were trained.

    Called on all ranks. Raises InputError, the same on every rank, for one that is damaged or of another model.
    """
    with input_errors_on_all(model.mesh.everyone):
        weights = checked_weights(path, "model", model.mesh.rank, model.mesh.size)
    _fitting_manifest(path, model)
    read_weights(weights, model.weights(), model.config.model, model.mesh.everyone)
    model.publish()


def load_pretrained(directory: Path, model: ShardedModel, adapters: Path | None = None) -> None:
    """Start from the weights in a Hugging Face directory, or from those in a checkpoint's model/.

    adapters: from these, as `load_adapters` takes them. New adapters, and the new score head of a model that is going
    to be trained, get first values from run.seed. Called on all ranks. Raises InputError on every rank for weights
    that are missing or of another shape.
    """
    config, mesh = model.config, model.mesh
    with input_errors_on_all(mesh.everyone):
        weights = checked_weights(directory, "model", mesh.rank, mesh.size)
    new = read_weights(weights, model.weights(), config.model, mesh.everyone)
    if adapters is not None:
        new -= load_adapters(adapters, model)
    if SCORE in new and not isinstance(model, Trainer):
        raise InputError(
            f"model.path: {adapters or directory} has no score head; name a trained reward model"
        )
    initialize(
        ((piece, view) for piece, view in model.weights() if piece.box.name in new),
        config.model,
        config.run.seed,
    )
    model.publish()


def load_adapters(directory: Path, model: ShardedModel) -> set[str]:
    """Take adapters, and a score head beside them, from a PEFT directory or a checkpoint's adapter/; -> their names.

    Called on all ranks. Raises InputError on every rank for adapters that are not those of the model's settings.
    """
    mesh = model.mesh
    with input_errors_on_all(mesh.everyone):
        adapters = checked_weights(directory, "adapter", mesh.rank, mesh.size)
    names = read_adapter(adapters, model.weights(), mesh.everyone)
    model.publish()
    return names


def checked_weights(path: Path, folder: str, rank: int = 0, num_ranks: int = 1) -> Path:
    """The directory itself, or, where it is a checkpoint, the folder in it with its weights: model or adapter.

    Raises InputError where this rank's share of what is there is damaged.
    """
    if path.name == folder and (path.parent / manifest.FILE).is_file():
        path = path.parent
    if not (path / manifest.FILE).is_file():
        return path
    contents = read_manifest(path)
    if not (path / folder).is_dir():
        raise InputError(f"{path}: {_INSTEAD[folder]}")
    _check_files(path, contents, rank, num_ranks, f"{folder}/")
    return path / folder


def _source(contents: Manifest, name: str, piece: Piece) -> tuple[Box, list[StoredBox]]:
    """What to read for a piece of a state: a box in the checkpoint's names, and the stored boxes of its tensor."""
    stored = f"{name}/{piece.box.name}"
    if name == "master" and stored not in contents.tensors:
        stored = piece.box.name
    return replace(piece.box, name=stored), contents.boxes(stored)


def _checked_manifest(path: Path, trainer: Trainer) -> Manifest:
    """The manifest of a checkpoint that is undamaged and that the trainer can go on from."""
    contents = _fitting_manifest(path, trainer)
    with input_errors_on_all(trainer.mesh.everyone):
        _check_files(path, contents, trainer.mesh.rank, trainer.mesh.size)
    return contents


def _fitting_manifest(path: Path, model: ShardedModel) -> Manifest:
    """The manifest of a checkpoint that has all that the model, or its trainer, has, in the same shapes."""
    mesh, flat = model.mesh, model.flat
    names = all_names(flat.pieces(flat.parameters), mesh.everyone)
    states = model.optimizer.state.keys() - {"master"} if isinstance(model, Trainer) else ()
    with input_errors_on_all(mesh.everyone):
        contents = read_manifest(path)
    check_model(path, model)
    with input_errors_on_all(mesh.everyone):
        _check_shapes(path, contents, model, names, sorted(states))
    return contents


def _check_shapes(
    path: Path, contents: Manifest, model: ShardedModel, names: set[str], states: Sequence[str]
) -> None:
    """Compare names and shapes with the model's."""
    stored = {name for name in contents.tensors if "/" not in name}
    for name in sorted(names ^ stored):
        what = "has no tensor" if name in names else "has a tensor that the model has not,"
        raise InputError(f"{path}: of another model; it {what} {name}; {_OTHER_MODEL}")
    for piece, _ in model.flat.pieces(model.flat.parameters):
        for name in (piece.box.name, *(f"{state}/{piece.box.name}" for state in states)):
            if name not in contents.tensors:
                raise InputError(f"{path}: has no tensor {name}, so training cannot be continued from it")
            if contents.tensors[name].shape != piece.box.shape:
                raise InputError(
                    f"{path}: of another model; its tensor {name} has shape {list(contents.tensors[name].shape)}, "
                    f"but the model's settings make it {list(piece.box.shape)}; {_OTHER_MODEL}"
                )


def _check_files(path: Path, contents: Manifest, rank: int, num_ranks: int, folder: str = "") -> None:
    """Compare this rank's share of all that is stored, or of what is in a folder, with its checksums."""
    reader = BoxReader(path)
    try:
        tensors = [stored for stored in _stored(contents) if stored.file.startswith(folder)]
        for stored in tensors[rank::num_ranks]:
            reader.check(stored)
        for file in sorted(name for name in contents.files if name.startswith(folder))[rank::num_ranks]:
            _check_file(path / file, contents.files[file])
    except InputError as error:
        raise InputError(f"{error}; remove this checkpoint and start again, from the one before it") from None


def _stored(contents: Manifest) -> Iterator[StoredBox]:
    for name in contents.tensors:
        yield from contents.boxes(name)


def _check_file(path: Path, expected: int) -> None:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    if zlib.crc32(content) != expected:
        raise InputError(f"{path}: damaged, not what was saved")
