"""Checkpoints: written so that one with its final name is complete, read under any layout.

A checkpoint holds manifest.json, model/ (a plain Hugging Face directory; of a model with adapters, adapter/, a PEFT
directory), optimizer/ (fp32 master weights and moments as boxes of global tensors), meaning.json (the settings that
its numbers depend on) and state.json (what the training loop needs). Another model that is trained along (a critic)
has all this in a folder of its own. Nothing is pickled.
There are no states of random number generators: training draws none; first weights and the order of samples are
pure functions of run.seed.

The run directory is one that all ranks see (a shared file system, on more than one node).
"""

from __future__ import annotations

import json
import re
import shutil
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from llm3d.config.places import complete_checkpoints, step_of
from llm3d.errors import InputError, TrainingAborted
from llm3d.models.build import initialise
from llm3d.models.heads import SCORE
from llm3d.models.hugging_face import all_names, config_files, index_of, read_weights, write_weights
from llm3d.models.peft import adapter_config, read_adapter, write_adapter
from llm3d.parallel.agreement import first_failure, input_errors_on_all
from llm3d.parallel.box_files import BoxReader, BoxWriter, StoredBox, split_by_size, sync
from llm3d.parallel.boxes import Box, Piece
from llm3d.parallel.collectives import gather_bytes
from llm3d.parallel.zero.flat import FlatParameters
from llm3d.train import manifest, meaning
from llm3d.train.manifest import Manifest, manifest_text, read_manifest
from llm3d.train.trainer import Evaluator, Trainer

BEST = "best"  # beside the checkpoints, a link to one
_LEFTOVER = re.compile(r"\.(step-\d{8,})\.(partial|replaced|deleted)")
_INSTEAD = {
    "model": "holds adapters and no whole model; set lora as it was, or let `llm3d export` merge them",
    "adapter": "holds a whole model and no adapters",
}
_OTHER_MODEL = "set model as it was when this was saved, or name another run.dir"


class Tokenizer(Protocol):
    """What a checkpoint asks of a tokenizer; `llm3d.data.tokenizer.Tokenizer` is one."""

    @property
    def bos_id(self) -> int | None: ...
    @property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens at which generation ends."""

    def save_to(self, directory: Path) -> None:
        """Write the files that transformers' AutoTokenizer loads."""


# ---- saving ----


def save_checkpoint(
    run_dir: Path,
    step: int,
    trainer: Trainer,
    state: dict[str, Any],
    tokenizer: Tokenizer | None = None,
    keep: int | None = None,
    best: int | None = None,
) -> Path:
    """Write run_dir/checkpoints/step-<step>, called on all ranks; -> its path.

    state: JSON.  keep: older checkpoints beyond this number are deleted once the new one is complete (those of
    later steps, left by a run that was continued from an earlier one, are not touched).  best: the step of the best
    one, which stays, and which the link run_dir/checkpoints/best leads to from then on.
    A checkpoint of the same step is replaced. Where any rank cannot write, every rank raises TrainingAborted
    with that rank's reason; what was there before is still there, and nothing else.
    """
    final = checkpoint_of(run_dir, step)
    partial = final.with_name(f".{final.name}.partial")
    writer = BoxWriter(partial)
    if trainer.mesh.rank == 0:
        with writer.keeping_failure(partial):
            final.parent.mkdir(parents=True, exist_ok=True)
            sync(final.parent.parent)
            _tidy(final.parent)
            for folder in ("", *trainer.companions):
                (partial / folder).mkdir()
    _agree(writer, trainer, partial)
    for folder, other in trainer.companions.items():
        _write(BoxWriter(partial / folder), partial, step, other, {"step": step}, tokenizer)
    _write(writer, partial, step, trainer, state, tokenizer)
    if trainer.mesh.rank == 0:
        with writer.keeping_failure(final):
            _put_in_place(partial, final)
            if best is not None:
                _link(final.parent / BEST, checkpoint_of(run_dir, best))
            _delete_older(final, keep, best)
    _agree(writer, trainer, partial)
    return final


def _write(
    writer: BoxWriter,
    partial: Path,
    step: int,
    trainer: Trainer,
    state: dict[str, Any],
    tokenizer: Tokenizer | None,
) -> None:
    """All of one trainer, the manifest last."""
    trainer.flat.settle()
    write = write_adapter if trainer.config.lora.rank else write_weights
    write(writer, trainer.flat, weights_folder(trainer))
    _write_optimizer(writer, trainer)
    if trainer.mesh.rank == 0:
        _write_small_files(writer, trainer, state, tokenizer)
    _agree(writer, trainer, partial)
    boxes = _gather_boxes(writer, trainer)
    if trainer.mesh.rank == 0:
        _write_manifest(writer, trainer, step, boxes)
    _agree(writer, trainer, partial)


def weights_folder(trainer: Trainer) -> str:
    """Where a checkpoint has its weights: those of a whole model, or adapters."""
    return "adapter" if trainer.config.lora.rank else "model"


def _agree(writer: BoxWriter, trainer: Trainer, partial: Path) -> None:
    """Go on where every rank has written all it had to; else leave nothing behind and raise on every rank."""
    failure = first_failure(writer.failure, trainer.mesh.everyone)
    if failure is not None:
        if trainer.mesh.rank == 0:
            with suppress(OSError):
                _tidy(partial.parent)
        raise TrainingAborted(f"checkpoint: {failure}")


def _write_optimizer(writer: BoxWriter, trainer: Trainer) -> None:
    """This rank's share of the optimizer's state, so that all ranks together write each element once."""
    share = _share(trainer.flat)
    values = [
        _entry(name, box, view)
        for name, flat in trainer.optimizer.state.items()
        for piece, view in trainer.flat.pieces(flat)
        for box in [piece.box]
        if piece.owned and box in share
    ]
    for i, run in enumerate(split_by_size([4 * box.numel for _, box, _ in values])):
        file = f"optimizer/rank-{trainer.mesh.rank:05d}-{i:03d}.safetensors"
        writer.tensors(file, values[run.start : run.stop])


def _share(flat: FlatParameters) -> set[Box]:
    """The owned boxes that this rank writes: where data ranks hold copies, the largest first, each to the rank with
    the least so far.
    """
    boxes = [piece.box for piece, _ in flat.pieces(flat.parameters) if piece.owned]
    load = [0] * flat.num_replicas
    mine = set()
    for box in sorted(boxes, key=lambda box: -box.numel):
        rank = load.index(min(load))
        load[rank] += box.numel
        if rank == flat.mesh.data_rank % flat.num_replicas:
            mine.add(box)
    return mine


def _entry(state: str, box: Box, values: Tensor) -> tuple[str, Box, Tensor]:
    box = replace(box, name=f"{state}/{box.name}")
    extents = (f"{start}:{start + size}" for start, size in zip(box.offset, box.size, strict=True))
    return f"{box.name}[{','.join(extents)}]", box, values


def _write_small_files(
    writer: BoxWriter, trainer: Trainer, state: dict[str, Any], tokenizer: Tokenizer | None
) -> None:
    writer.text("state.json", json.dumps({**state, **trainer.state}, indent=1) + "\n")
    writer.text(meaning.FILE, json.dumps(trainer.meaning, indent=1) + "\n")
    config, head = trainer.config, trainer.objective.head
    tokens = (tokenizer.bos_id, tokenizer.end_ids) if tokenizer is not None else (None, ())
    files = config_files(config.model, trainer.dtype, head, *tokens)
    if config.lora.rank:
        files = {"adapter_config.json": adapter_config(config, head)}
    for name, content in files.items():
        writer.text(f"{weights_folder(trainer)}/{name}", content)
    if tokenizer is not None:
        _write_tokenizer(writer, weights_folder(trainer), tokenizer)


def _write_tokenizer(writer: BoxWriter, folder: str, tokenizer: Tokenizer) -> None:
    """Into a place of its own first: in the folder, other ranks are writing weights meanwhile."""
    apart = writer.directory / "tokenizer"
    with writer.keeping_failure(apart):
        apart.mkdir()
        tokenizer.save_to(apart)
        for path in sorted(apart.iterdir()):
            writer.written(path.rename(writer.directory / folder / path.name))
        apart.rmdir()


def _gather_boxes(writer: BoxWriter, trainer: Trainer) -> list[StoredBox]:
    """What all ranks have written."""
    everyone = gather_bytes(
        json.dumps([asdict(stored) for stored in writer.boxes]).encode(), trainer.mesh.everyone
    )
    return [StoredBox.of(fields) for boxes in everyone for fields in json.loads(boxes)]


def _write_manifest(writer: BoxWriter, trainer: Trainer, step: int, boxes: list[StoredBox]) -> None:
    """The index of the weights, then, when all else is on disk, the manifest."""
    index = index_of([stored for stored in boxes if stored.file.startswith("model/")])
    if index is not None:
        writer.text(f"model/{index[0]}", index[1])
    mesh = trainer.mesh
    layout = {
        "tensor": mesh.tensor_size,
        "pipeline": mesh.pipeline_size,
        "chunks": trainer.config.parallel.chunks,
        "data": mesh.data_size,
        "zero": trainer.config.zero.stage,
    }
    text = manifest_text(step, trainer.optimizer.steps_taken, layout, writer.files, boxes)
    writer.text(manifest.FILE, text)
    with writer.keeping_failure(writer.directory):
        for folder in (weights_folder(trainer), "optimizer", "."):
            sync(writer.directory / folder)


def _put_in_place(partial: Path, final: Path) -> None:
    """Give the finished directory its name; one that has it already makes way."""
    replaced = final.with_name(f".{final.name}.replaced")
    if final.exists():
        final.rename(replaced)
    partial.rename(final)
    sync(final.parent)
    if replaced.exists():
        shutil.rmtree(replaced)


def _link(link: Path, target: Path) -> None:
    """Have the link lead to a checkpoint beside it; at no time does it lead nowhere."""
    if link.is_symlink() and link.readlink().name == target.name:
        return
    new = link.with_name(f".{link.name}.partial")
    new.unlink(missing_ok=True)
    new.symlink_to(target.name)
    new.replace(link)
    sync(link.parent)


def _delete_older(newest: Path, keep: int | None, best: int | None) -> None:
    earlier = [path for path in complete_checkpoints(newest.parent.parent) if step_of(path) < step_of(newest)]
    older = [path for path in earlier if step_of(path) != best]
    for path in older[: max(0, len(older) + 1 - keep)] if keep is not None else []:
        deleted = path.with_name(f".{path.name}.deleted")
        path.rename(deleted)
        shutil.rmtree(deleted)


def _tidy(checkpoints: Path) -> None:
    """Remove what a run that was killed while it saved or deleted has left."""
    for path in list(checkpoints.iterdir()):
        match = _LEFTOVER.fullmatch(path.name)
        if match is None:
            continue
        final = path.with_name(match[1])
        if match[2] == "replaced" and not final.exists():
            path.rename(final)  # killed between the two renames
        else:
            shutil.rmtree(path)


def checkpoint_of(run_dir: Path, step: int) -> Path:
    """Where a run has its checkpoint of a step."""
    return Path(run_dir) / "checkpoints" / f"step-{step:08d}"


# ---- loading ----


def step_of_checkpoint(path: Path, trainer: Trainer) -> int:
    """After which step it was saved. Called on all ranks; its weights are not read.

    Raises InputError, the same on every rank, for a checkpoint that the trainer cannot go on from: of another model,
    or with settings without which it means something else.
    """
    for folder, other in trainer.companions.items():
        _check_companion(path, folder, other)
    return _fitting_manifest(path, trainer).step


def _check_companion(path: Path, folder: str, trainer: Trainer) -> None:
    try:
        _fitting_manifest(path / folder, trainer)
    except InputError as error:
        raise InputError(f"of the {folder}, {error}") from None


def check_model(path: Path, model: Evaluator) -> None:
    """Raise InputError, the same on every rank, where a checkpoint was made with other settings. Called on all ranks.

    Of an Evaluator only what the model computes counts; of a Trainer all that it goes on with.
    """
    with input_errors_on_all(model.mesh.everyone):
        if model.mesh.rank == 0:
            meaning.check_meaning(path, model.config, model.meaning if isinstance(model, Trainer) else None)


def load_checkpoint(path: Path, trainer: Trainer) -> dict[str, Any]:
    """Continue from a checkpoint, whatever layout and precision saved it: fill weights and moments; -> its state.

    Called on all ranks. Each rank first checks its share of the checksums, then reads the boxes it holds.
    A run in bf16 takes the weights of one in fp32 as its master weights; a run in fp32 takes over the master
    weights. Raises InputError, the same on every rank, for a checkpoint that is damaged or of another model.
    """
    path, optimizer, flat = Path(path), trainer.optimizer, trainer.flat
    found = _checked_manifest(path, trainer)
    with input_errors_on_all(trainer.mesh.everyone):
        reader = BoxReader(path)
        for name, values in {**optimizer.state, "master": optimizer.master}.items():
            for piece, view in flat.pieces(values):
                reader.read(*_source(found, name, piece), view)
        state = json.loads((path / "state.json").read_bytes())
    optimizer.publish()
    optimizer.set_steps_taken(found.optimizer_steps)
    trainer.restore(state)
    for folder, other in trainer.companions.items():
        load_checkpoint(path / folder, other)
    return state


def load_weights(path: Path, model: Evaluator) -> None:
    """Take the weights of a checkpoint of this very model, all of whose weights were trained.

    Called on all ranks. Raises InputError, the same on every rank, for one that is damaged or of another model.
    """
    with input_errors_on_all(model.mesh.everyone):
        weights = checked_weights(path, "model", model.mesh.rank, model.mesh.size)
    _fitting_manifest(path, model)
    read_weights(weights, model.weights(), model.config.model, model.mesh.everyone)
    model.publish()


def load_pretrained(directory: Path, model: Evaluator, adapters: Path | None = None) -> None:
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
    initialise(
        ((piece, view) for piece, view in model.weights() if piece.box.name in new),
        config.model,
        config.run.seed,
    )
    model.publish()


def load_adapters(directory: Path, model: Evaluator) -> set[str]:
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
    found = read_manifest(path)
    if not (path / folder).is_dir():
        raise InputError(f"{path}: {_INSTEAD[folder]}")
    _check_files(path, found, rank, num_ranks, f"{folder}/")
    return path / folder


def _source(found: Manifest, name: str, piece: Piece) -> tuple[Box, list[StoredBox]]:
    """What to read for a piece of a state: a box in the checkpoint's names, and the stored boxes of its tensor."""
    stored = f"{name}/{piece.box.name}"
    if name == "master" and stored not in found.tensors:
        stored = piece.box.name
    return replace(piece.box, name=stored), found.boxes(stored)


def _checked_manifest(path: Path, trainer: Trainer) -> Manifest:
    """The manifest of a checkpoint that is undamaged and that the trainer can go on from."""
    found = _fitting_manifest(path, trainer)
    with input_errors_on_all(trainer.mesh.everyone):
        _check_files(path, found, trainer.mesh.rank, trainer.mesh.size)
    return found


def _fitting_manifest(path: Path, model: Evaluator) -> Manifest:
    """The manifest of a checkpoint that has all that the model, or its trainer, has, in the same shapes."""
    mesh, flat = model.mesh, model.flat
    names = all_names(flat.pieces(flat.parameters), mesh.everyone)
    states = model.optimizer.state.keys() - {"master"} if isinstance(model, Trainer) else ()
    with input_errors_on_all(mesh.everyone):
        found = read_manifest(path)
    check_model(path, model)
    with input_errors_on_all(mesh.everyone):
        _check_shapes(path, found, model, names, sorted(states))
    return found


def _check_shapes(
    path: Path, found: Manifest, model: Evaluator, names: set[str], states: Sequence[str]
) -> None:
    """Compare names and shapes with the model's."""
    stored = {name for name in found.tensors if "/" not in name}
    for name in sorted(names ^ stored):
        what = "has no tensor" if name in names else "has a tensor that the model has not,"
        raise InputError(f"{path}: of another model; it {what} {name}; {_OTHER_MODEL}")
    for piece, _ in model.flat.pieces(model.flat.parameters):
        for name in (piece.box.name, *(f"{state}/{piece.box.name}" for state in states)):
            if name not in found.tensors:
                raise InputError(f"{path}: has no tensor {name}, so training cannot be continued from it")
            if found.tensors[name].shape != piece.box.shape:
                raise InputError(
                    f"{path}: of another model; its tensor {name} has shape {list(found.tensors[name].shape)}, "
                    f"but the model's settings make it {list(piece.box.shape)}; {_OTHER_MODEL}"
                )


def _check_files(path: Path, found: Manifest, rank: int, num_ranks: int, folder: str = "") -> None:
    """Compare this rank's share of all that is stored, or of what is in a folder, with its checksums."""
    reader = BoxReader(path)
    try:
        tensors = [stored for stored in _stored(found) if stored.file.startswith(folder)]
        for stored in tensors[rank::num_ranks]:
            reader.check(stored)
        for file in sorted(name for name in found.files if name.startswith(folder))[rank::num_ranks]:
            _check_file(path / file, found.files[file])
    except InputError as error:
        raise InputError(f"{error}; remove this checkpoint and start again, from the one before it") from None


def _stored(found: Manifest) -> Iterator[StoredBox]:
    for name in found.tensors:
        yield from found.boxes(name)


def _check_file(path: Path, expected: int) -> None:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    if zlib.crc32(content) != expected:
        raise InputError(f"{path}: damaged, not what was saved")
