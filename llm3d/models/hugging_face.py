"""A LLaMA as a plain Hugging Face directory: written from any layout, read into any."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from llm3d.config import ModelConfig
from llm3d.errors import InputError
from llm3d.models.adapters import is_adapter
from llm3d.models.build import initial_value
from llm3d.models.heads import SCORE, HeadName
from llm3d.parallel.agreement import input_errors_on_all
from llm3d.parallel.box_files import BoxReader, BoxWriter, StoredBox, box_of, split_by_size
from llm3d.parallel.boxes import Box, Piece
from llm3d.parallel.collectives import gather_bytes
from llm3d.parallel.zero.flat import FlatParameters

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_OF_HEAD: dict[HeadName, dict[str, Any]] = {  # what config.json says of it
    "language": {"architectures": ["LlamaForCausalLM"]},
    "score": {
        "architectures": ["LlamaForSequenceClassification"],
        "num_labels": 1,
        "id2label": {"0": "score"},
        "label2id": {"score": 0},
    },
}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

# ---- writing ----


def write_weights(writer: BoxWriter, flat: FlatParameters, folder: str) -> None:
    """Write the model's weights, in their compute dtype, as sharded safetensors under `folder`.

    Called on all ranks. A file holds whole tensors of one pipeline stage, about box_files.FILE_BYTES; its writer,
    one rank of those that together hold the stage, receives their parts from them. Files go round these ranks, and
    round the copies of the stage, so that many disks or links share the work.
    """
    mesh, group = flat.mesh, flat.replica
    parts = owned_parts(flat, group)
    names = in_model_order(parts)
    whole = {name: Box.whole(name, parts[name][0][1].shape) for name in names}
    runs = split_by_size([whole[name].numel * flat.dtype.itemsize for name in names])
    counts = [int(count) for count in gather_bytes(str(len(runs)).encode(), mesh.pipeline)]
    first, total = sum(counts[: mesh.pipeline_rank]), sum(counts)
    views = {piece.box: view for piece, view in flat.pieces(flat.parameters) if piece.owned}
    for i, run in enumerate(runs):
        if i % flat.num_replicas != mesh.data_rank % flat.num_replicas:
            continue
        writing_rank = i // flat.num_replicas % group.size()
        keys = names[run.start : run.stop]
        values = [
            gather_whole(whole[key], parts[key], views, flat.dtype, group, writing_rank) for key in keys
        ]
        if group.rank() == writing_rank:
            file = f"model-{first + i + 1:05d}-of-{total:05d}.safetensors" if total > 1 else _SINGLE
            boxes = [whole[key] for key in keys]
            writer.tensors(f"{folder}/{file}", list(zip(keys, boxes, values, strict=True)))


def owned_parts(flat: FlatParameters, group: ProcessGroup) -> dict[str, list[tuple[int, Box]]]:
    """By global tensor: the ranks of the group, and the boxes that each owns. Called on all its ranks."""
    mine = [asdict(piece.box) for piece, _ in flat.pieces(flat.parameters) if piece.owned]
    parts: dict[str, list[tuple[int, Box]]] = {}
    for rank, boxes in enumerate(gather_bytes(json.dumps(mine).encode(), group)):
        for box in map(box_of, json.loads(boxes)):
            parts.setdefault(box.name, []).append((rank, box))
    return parts


def gather_whole(
    whole: Box,
    parts: list[tuple[int, Box]],
    views: dict[Box, Tensor],
    dtype: torch.dtype,
    group: ProcessGroup,
    writing_rank: int,
) -> Tensor:
    """A global tensor on the host of one rank of the group, to which the others send their parts of it.

    On the other ranks, what is returned is empty.
    """
    rank = group.rank()
    values = torch.empty(whole.size if rank == writing_rank else 0, dtype=dtype)
    for source, box in parts:
        if rank == writing_rank:
            part = views[box] if source == rank else torch.empty(box.size, dtype=dtype)
            if source != rank:
                dist.recv(part, group=group, group_src=source)
            values[box.slices_within(whole)].copy_(part)
        elif rank == source:
            dist.send(views[box].cpu().contiguous(), group=group, group_dst=writing_rank)
    return values


def in_model_order(names: Iterable[str]) -> list[str]:
    """Layers by number. Only numbers meet numbers: names that differ in kind differ earlier."""
    return sorted(names, key=lambda name: [int(part) if part.isdigit() else part for part in name.split(".")])


def index_of(stored: Sequence[StoredBox]) -> tuple[str, str] | None:
    """File name and content of the index of sharded weights; None where one file holds them all, or none is there."""
    files = {box.key: Path(box.file).name for box in stored}
    if len(set(files.values())) <= 1:
        return None
    size = sum(box.box.numel * getattr(torch, box.dtype).itemsize for box in stored)
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(files.items()))}
    return _INDEX, json.dumps(index, indent=2) + "\n"


def config_files(config: ModelConfig, dtype: torch.dtype, head: HeadName = "language") -> dict[str, str]:
    """config.json and generation_config.json, by name. transformers 4 and 5 both read them."""
    files = {"config.json": _config(config, str(dtype).removeprefix("torch."), head)}
    tokens = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    if head == "language" and tokens["eos_token_id"] is not None:
        files["generation_config.json"] = {"_from_model_config": True} | tokens
    return {name: json.dumps(content, indent=2) + "\n" for name, content in files.items()}


def _config(config: ModelConfig, dtype: str, head: HeadName) -> dict[str, Any]:
    fields = config.model_dump(mode="json", exclude={"path", "rope_scaling", "rope_theta"})
    scaling = config.rope_scaling.model_dump(exclude_none=True) if config.rope_scaling else None
    return {
        **_OF_HEAD[head],
        "model_type": "llama",
        **fields,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "mlp_bias": False,
        # transformers 4 reads these two, transformers 5 the third.
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "rope_parameters": {"rope_theta": config.rope_theta, **(scaling or {"rope_type": "default"})},
        "dtype": dtype,
        "torch_dtype": dtype,
        "use_cache": True,
    }


def config_of_scores(config: dict[str, Any], pad_token_id: int | None) -> dict[str, Any]:
    """A language model's config.json as that of a model with a score head in the language head's place."""
    return config | _OF_HEAD["score"] | {"pad_token_id": pad_token_id}


# ---- reading ----


def read_weights(
    directory: Path,
    weights: Iterable[tuple[Piece, Tensor]],
    config: ModelConfig,
    everyone: ProcessGroup,
    seed: int = 0,
) -> None:
    """Fill the weights of a model from a Hugging Face directory; each rank reads its boxes.

    Called on all ranks. A tied model's output weights may be stored under the embedding's name, the head's or
    both. Adapters, and a score head in the place of a language model's, get first values from `seed`.
    Raises InputError on every rank where a tensor is missing, has another shape or no place in the model.
    """
    weights = list(weights)
    names = all_names(weights, everyone)
    with input_errors_on_all(everyone):
        reader = BoxReader(directory)
        files = weight_files(reader)
        if config.tie_word_embeddings:
            head = files.pop(HEAD, None)
            if head is not None and EMBEDDING not in files:
                files[EMBEDDING] = head
        new = {name for name in names - files.keys() if name == SCORE or is_adapter(name)}
        if SCORE in new:
            files.pop(HEAD, None)
        _check_names(directory, names - new, files)
        for piece, view in weights:
            if piece.box.name in new:
                view.copy_(initial_value(piece.box, config, seed))
                continue
            stored = _find(reader, files[piece.box.name], piece.box.name)
            check_shape(directory, piece.box, stored)
            reader.read(piece.box, [stored], view)


def all_names(weights: Iterable[tuple[Piece, Tensor]], everyone: ProcessGroup) -> set[str]:
    """Names of the tensors that any rank has weights of. Called on all ranks."""
    mine = sorted({piece.box.name for piece, _ in weights})
    return {name for names in gather_bytes(json.dumps(mine).encode(), everyone) for name in json.loads(names)}


def check_shape(directory: Path, wanted: Box, stored: StoredBox) -> None:
    if stored.box.shape != wanted.shape:
        raise InputError(
            f"{directory / stored.file}: tensor {wanted.name} has shape {list(stored.box.shape)}, "
            f"but the model's settings make it {list(wanted.shape)}"
        )


def weight_files(reader: BoxReader) -> dict[str, str]:
    """The file of each tensor, by name."""
    directory = reader.directory
    if (directory / _INDEX).is_file():
        return _read_index(directory / _INDEX)
    if (directory / _SINGLE).is_file():
        return dict.fromkeys(reader.keys(_SINGLE), _SINGLE)
    pickled = sorted(directory.glob("pytorch_model*.bin"))
    if pickled:
        raise InputError(
            f"{pickled[0]}: pickled weights are not read, since reading them runs any code they hold; where you "
            f"trust them, let transformers write safetensors: "
            f"LlamaForCausalLM.from_pretrained(DIRECTORY).save_pretrained(NEW_DIRECTORY)"
        )
    raise InputError(f"{directory}: holds neither {_SINGLE} nor {_INDEX}; name a directory with weights")


def _read_index(path: Path) -> dict[str, str]:
    try:
        files = json.loads(path.read_bytes())["weight_map"]
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError, KeyError, TypeError):
        raise InputError(f"{path}: damaged, it has no weight_map from tensors to files") from None
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise InputError(f"{path}: damaged, its weight_map does not give each tensor a file")
    return dict(files)


def _check_names(directory: Path, names: set[str], files: dict[str, str]) -> None:
    if SCORE in files.keys() - names:
        raise InputError(
            f"model.path: {directory} holds a reward model, which has scores in the place of a language model's head; "
            "name a language model"
        )
    missing = in_model_order(names - files.keys())
    if missing:
        raise InputError(f"{directory}: holds no tensor {missing[0]} ({len(missing)} missing in all)")
    # Old conversions of LLaMA store the rotary frequencies, which follow from the settings.
    unknown = sorted(name for name in files.keys() - names if not name.endswith(".rotary_emb.inv_freq"))
    if unknown:
        raise InputError(
            f"{directory}: tensor {unknown[0]} in {files[unknown[0]]} has no place in the model "
            f"({len(unknown)} such tensors in all); do config.json and weights belong together?"
        )


def _find(reader: BoxReader, file: str, name: str) -> StoredBox:
    """The tensor in its file; a tied model's embedding may be there under the head's name."""
    stored = reader.whole(file, name)
    if stored is None and name == EMBEDDING:
        stored = reader.whole(file, HEAD)
    if stored is None:
        raise InputError(f"{reader.directory / file}: holds no tensor {name}, though the index says so")
    return stored.named(name)
