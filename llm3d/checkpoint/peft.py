"""Adapters as PEFT directories: adapter_config.json and adapter_model.safetensors, written and read."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor
from torch.distributed import ProcessGroup

from llm3d.checkpoint.box_files import BoxReader, BoxWriter
from llm3d.checkpoint.hugging_face import (
    all_names,
    check_shape,
    gather_whole,
    in_model_order,
    owned_parts,
    ranks_of_a_copy,
)
from llm3d.config import Config
from llm3d.config.hugging_face import hugging_face_directory
from llm3d.config.peft import PREFIX, WEIGHTS
from llm3d.errors import InputError
from llm3d.models.adapters import is_adapter
from llm3d.models.heads import SCORE, HeadName
from llm3d.parallel.agreement import input_errors_on_all
from llm3d.parallel.boxes import Box, Piece
from llm3d.parallel.zero.flat import FlatParameters


def write_adapter(writer: BoxWriter, flat: FlatParameters, folder: str) -> None:
    """Write all that is trained, in the compute dtype, into one file. Called on all ranks; each sends rank 0 its parts.

    Rank 0 has all of it in host memory at once, which for adapters is little.
    """
    if flat.replica_rank:
        return
    group = ranks_of_a_copy(flat)
    parts = owned_parts(flat, group)
    views = {piece.box: view for piece, view in flat.pieces(flat.parameters) if piece.owned}
    whole = {name: Box.whole(name, parts[name][0][1].shape) for name in in_model_order(parts)}
    values = [gather_whole(box, parts[name], views, flat.dtype, group, 0) for name, box in whole.items()]
    if group.rank() == 0:
        entries = [
            (f"{PREFIX}{name}", box, value) for (name, box), value in zip(whole.items(), values, strict=True)
        ]
        writer.tensors(f"{folder}/{WEIGHTS}", entries)


def adapter_config(config: Config, head: HeadName) -> str:
    """adapter_config.json. The base is named by the whole path of the directory with its config.json."""
    lora = config.lora
    assert config.model.path is not None, "checked with the settings"
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if head == "language" else "SEQ_CLS",
        "base_model_name_or_path": str(hugging_face_directory(config.model.path).resolve()),
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "use_rslora": lora.rslora,
        "lora_dropout": lora.dropout,
        "target_modules": list(lora.targets),
        "modules_to_save": ["score"] if head == "score" else None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    return json.dumps(content, indent=2) + "\n"


def read_adapter(
    directory: Path, weights: Iterable[tuple[Piece, Tensor]], everyone: ProcessGroup
) -> set[str]:
    """Fill the adapters among the weights from a PEFT directory, and a score head where it has one; -> their names.

    Called on all ranks. Raises InputError on every rank where the adapters are not those of the model's settings.
    """
    adapters = [
        (piece, view) for piece, view in weights if is_adapter(piece.box.name) or piece.box.name == SCORE
    ]
    names = all_names(adapters, everyone)
    with input_errors_on_all(everyone):
        reader = BoxReader(directory)
        stored = {key.removeprefix(PREFIX) for key in peft_names(reader)}
        _check_names(directory / WEIGHTS, names, stored)
        for piece, view in adapters:
            if piece.box.name in stored:
                stored_box = reader.whole(WEIGHTS, f"{PREFIX}{piece.box.name}")
                assert stored_box is not None, "it is among the file's keys"
                check_shape(directory, piece.box, stored_box)
                reader.read(piece.box, [stored_box.named(piece.box.name)], view)
    return stored


def peft_names(reader: BoxReader) -> list[str]:
    """The keys of an adapter's file. Raises InputError for one that PEFT would not read."""
    keys = reader.keys(WEIGHTS)
    for key in keys:
        if not key.startswith(PREFIX):
            raise InputError(
                f"{reader.directory / WEIGHTS}: tensor {key} is not named as PEFT names it, {PREFIX}..."
            )
    return keys


def _check_names(file: Path, names: set[str], stored: set[str]) -> None:
    """The file has to have all adapters that the model has, and nothing else but perhaps a score head."""
    if SCORE in stored - names:
        raise InputError(
            f"lora.path: {file} holds adapters of a reward model, with its score head; "
            "name adapters of a language model"
        )
    for name in in_model_order(names ^ stored):
        if name != SCORE:
            what = "holds no tensor" if name in names else "has for the model no use for its tensor"
            raise InputError(f"{file}: {what} {name}; do lora.path and model.path belong together?")
