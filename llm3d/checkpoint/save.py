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
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from torch import Tensor
from torch.distributed import ProcessGroup

from llm3d.checkpoint import manifest
from llm3d.checkpoint.box_files import BoxWriter, StoredBox, split_by_size
from llm3d.checkpoint.hugging_face import config_files, index_of, write_weights
from llm3d.checkpoint.manifest import manifest_text
from llm3d.checkpoint.peft import adapter_config, write_adapter
from llm3d.config.places import complete_checkpoints, step_of
from llm3d.errors import TrainingAborted
from llm3d.files import sync
from llm3d.parallel.agreement import first_failure
from llm3d.parallel.boxes import Box
from llm3d.parallel.collectives import gather_bytes
from llm3d.parallel.zero.flat import FlatParameters
from llm3d.train import meaning
from llm3d.train.trainer import Trainer

ALONE: Mapping[str, Trainer] = MappingProxyType({})
BEST = "best"  # beside the checkpoints, a link to one
_LEFTOVER = re.compile(r"\.(step-\d{8,})\.(partial|replaced|deleted)")


class SavedTokenizer(Protocol):
    """What a checkpoint asks of a tokenizer; `llm3d.text.tokenizer.Tokenizer` is one."""

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
    tokenizer: SavedTokenizer | None = None,
    keep: int | None = None,
    best: int | None = None,
    others: Mapping[str, Trainer] = ALONE,
) -> Path:
    """Write run_dir/checkpoints/step-<step>, called on all ranks; -> its path.

    state: JSON.  keep: older checkpoints beyond this number are deleted once the new one is complete (those of
    later steps, left by a run that was continued from an earlier one, are not touched).  best: the step of the best
    one, which stays, and which the link run_dir/checkpoints/best leads to from then on.  others: models that are
    trained along, by the folder that each gets.
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
            for folder in ("", *others):
                (partial / folder).mkdir()
    _agree(writer, trainer, partial)
    for folder, other in others.items():
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
    tokenizer: SavedTokenizer | None,
) -> None:
    """All of one trainer, the manifest last."""
    trainer.flat.wait_all_gathers()
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
    """The owned boxes that this rank writes: where replicas hold the same, the largest first, each to the rank with
    the least so far.
    """
    owned = [
        (unit, piece.box) for unit in flat.units for piece, _ in unit.pieces(unit.parameters) if piece.owned
    ]
    loads: dict[ProcessGroup, list[int]] = {}
    mine = set()
    for unit, box in sorted(owned, key=lambda each: -each[1].numel):
        load = loads.setdefault(unit.group, [0] * unit.num_replicas)
        rank = load.index(min(load))
        load[rank] += box.numel
        if rank == unit.replica_rank:
            mine.add(box)
    return mine


def _entry(state: str, box: Box, values: Tensor) -> tuple[str, Box, Tensor]:
    box = replace(box, name=f"{state}/{box.name}")
    extents = (f"{start}:{start + size}" for start, size in zip(box.offset, box.size, strict=True))
    return f"{box.name}[{','.join(extents)}]", box, values


def _write_small_files(
    writer: BoxWriter, trainer: Trainer, state: dict[str, Any], tokenizer: SavedTokenizer | None
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


def _write_tokenizer(writer: BoxWriter, folder: str, tokenizer: SavedTokenizer) -> None:
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
