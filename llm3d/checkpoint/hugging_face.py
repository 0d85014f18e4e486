"""A model as a plain Hugging Face directory: written from any layout, read into any."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from llm3d.checkpoint.box_files import BoxReader, BoxWriter, StoredBox, box_of, split_by_size
from llm3d.config import ModelConfig
from llm3d.config.families import ARCHITECTURES
from llm3d.config.hugging_face import generation_settings, token_ids
from llm3d.errors import InputError
from llm3d.kernels.rope import inverse_frequencies
from llm3d.models.adapters import is_adapter
from llm3d.models.heads import SCORE, HeadName
from llm3d.parallel.agreement import input_errors_on_all
from llm3d.parallel.boxes import Box, Piece
from llm3d.parallel.collectives import gather_bytes
from llm3d.parallel.mesh import Mesh
from llm3d.parallel.zero.flat import FlatParameters

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

# ---- writing ----


def write_weights(writer: BoxWriter, flat: FlatParameters, folder: str) -> None:
    """Write the model's weights, in their compute dtype, as sharded safetensors under `folder`.

    Called on all ranks. A file holds whole tensors of one pipeline stage, about box_files.FILE_BYTES; its writer,
    one rank of those that together hold the stage, receives their parts from them. Files go round these ranks, and
    round the copies of the stage, so that many disks or links share the work. A model that fits one file is in one.
    """
    mesh, group = flat.mesh, flat.replica
    parts = owned_parts(flat, group)
    in_one_file = len(split_by_size(_of_stages(sum(_sizes(parts, flat.dtype)), mesh))) == 1
    if in_one_file:
        group = ranks_of_a_copy(flat)
        parts = owned_parts(flat, group)
    names = in_model_order(parts)
    whole = {name: Box.whole(name, parts[name][0][1].shape) for name in names}
    runs = split_by_size(_sizes({name: parts[name] for name in names}, flat.dtype))
    counts = [1] if in_one_file else _of_stages(len(runs), mesh)
    first, total = sum(counts[: mesh.pipeline_rank]), sum(counts)
    views = {piece.box: view for piece, view in flat.pieces(flat.parameters) if piece.owned}
    for i, run in enumerate(runs):
        if i % flat.num_replicas != flat.replica_rank:
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


def _sizes(parts: dict[str, list[tuple[int, Box]]], dtype: torch.dtype) -> list[int]:
    """Bytes of each global tensor."""
    return [math.prod(owned[0][1].shape) * dtype.itemsize for owned in parts.values()]


def _of_stages(number: int, mesh: Mesh) -> list[int]:
    """Each pipeline stage's number, on all of them; tensor ranks have the same."""
    numbers = gather_bytes(str(number).encode(), mesh.model)
    return [int(each) for each in numbers[:: mesh.tensor_size]]


def ranks_of_a_copy(flat: FlatParameters) -> ProcessGroup:
    """The ranks whose shards together are one copy of the model."""
    return flat.mesh.model if flat.num_replicas > 1 else flat.mesh.everyone


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
    """Layers by number."""
    return sorted(
        names,
        key=lambda name: [
            (part.isdecimal(), int(part) if part.isdecimal() else part) for part in name.split(".")
        ],
    )


def index_of(stored: Sequence[StoredBox]) -> tuple[str, str] | None:
    """File name and content of the index of sharded weights; None where one file holds them all, or none is there."""
    files = {box.key: Path(box.file).name for box in stored}
    if len(set(files.values())) <= 1:
        return None
    size = sum(box.box.numel * getattr(torch, box.dtype).itemsize for box in stored)
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(files.items()))}
    return _INDEX, json.dumps(index, indent=2) + "\n"


def config_files(
    config: ModelConfig,
    dtype: torch.dtype,
    head: HeadName = "language",
    bos_id: int | None = None,
    end_ids: Sequence[int] = (),
) -> dict[str, str]:
    """config.json and generation_config.json, by name. transformers 4 and 5 both read them.

    bos_id, end_ids: of the run's tokenizer and template, see `with_tokens`. What the generation_config.json of the
    model that training started from says beside is kept.
    """
    files = {"config.json": _config(config, str(dtype).removeprefix("torch."), head)}
    if head == "language":
        generation = generation_settings(config.path)
        config_json, generation = with_tokens(files["config.json"], generation, bos_id, end_ids)
        files = {"config.json": config_json} | ({"generation_config.json": generation} if generation else {})
    return {name: json.dumps(content, indent=2) + "\n" for name, content in files.items()}


def with_tokens(
    config: dict[str, Any], generation: dict[str, Any], bos_id: int | None, end_ids: Sequence[int]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json and generation_config.json of a language model, with the tokens at which generation begins and ends.

    bos_id counts where the model's own files name none. Generation ends at what either file says and at end_ids,
    one or a list. Without any token there is nothing to say of generation.
    """
    ends = token_ids(config.get("eos_token_id"), generation.get("eos_token_id"), end_ids)
    starts = token_ids(config.get("bos_token_id"), generation.get("bos_token_id"), bos_id)
    tokens = {
        "bos_token_id": starts[0] if starts else None,
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
    }
    kept = {key: value for key, value in generation.items() if key not in ("_from_model_config", *tokens)}
    token_fields = {name: value for name, value in tokens.items() if value is not None}
    return config | tokens, token_fields | kept if ends or kept else {}


def _config(config: ModelConfig, dtype: str, head: HeadName) -> dict[str, Any]:
    family = config.architecture
    fields = config.model_dump(mode="json", exclude={"path", "rope_scaling", "rope_theta"})
    scaling = config.rope_scaling.model_dump(exclude_none=True) if config.rope_scaling else None
    return {
        **family.heads[head],
        "model_type": family.model_type,
        **fields,
        **family.fixed,
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
    return config | ARCHITECTURES[config["model_type"]].heads["score"] | {"pad_token_id": pad_token_id}


# ---- reading ----


def read_weights(
    directory: Path, weights: Iterable[tuple[Piece, Tensor]], config: ModelConfig, everyone: ProcessGroup
) -> set[str]:
    """Fill the weights of a model from a Hugging Face directory; each rank reads its boxes.

    Called on all ranks. Left as they are, and returned by name, are adapters, and a score head where the directory has
    a language model's. A tied model's output weights may be stored under the embedding's name, the head's or both.
    Raises InputError on every rank where a tensor is missing, has another shape or no place in the model.
    """
    weights = list(weights)
    names = all_names(weights, everyone)
    with input_errors_on_all(everyone):
        reader = BoxReader(directory)
        files = weight_files(reader)
        _check_frequencies(reader, files, config)
        _check_tied_head(reader, files, weights, config)
        missing = {name for name in names - files.keys() if name == SCORE or is_adapter(name)}
        if SCORE in missing:
            files.pop(HEAD, None)
        _check_names(directory, names - missing, files)
        for piece, view in weights:
            name = piece.box.name
            if name not in missing:
                stored = _stored(reader, files[name], name)
                check_shape(directory, piece.box, stored)
                reader.read(piece.box, [stored], view)
    return missing


def has_score_head(directory: Path) -> bool:
    """Whether a Hugging Face directory has a reward model's head. Raises InputError where it has no weights."""
    return SCORE in weight_files(BoxReader(directory))


def all_names(weights: Iterable[tuple[Piece, Tensor]], everyone: ProcessGroup) -> set[str]:
    """Names of the tensors that any rank has weights of. Called on all ranks."""
    mine = sorted({piece.box.name for piece, _ in weights})
    return {name for names in gather_bytes(json.dumps(mine).encode(), everyone) for name in json.loads(names)}


def check_shape(directory: Path, expected: Box, stored: StoredBox) -> None:
    if stored.box.shape != expected.shape:
        raise InputError(
            f"{directory / stored.file}: tensor {expected.name} has shape {list(stored.box.shape)}, "
            f"but the model's settings make it {list(expected.shape)}"
        )


def weight_files(reader: BoxReader) -> dict[str, str]:
    """The file of each tensor, by name: all tensors of all files that the directory's weights are in.

    Raises InputError where files, or the index and its files, say different things.
    """
    directory = reader.directory
    if (directory / _INDEX).is_file():
        return _indexed_files(reader)
    if (directory / _SINGLE).is_file():
        return dict.fromkeys(reader.keys(_SINGLE), _SINGLE)
    pickled = sorted(directory.glob("pytorch_model*.bin"))
    if pickled:
        raise InputError(
            f"{pickled[0]}: pickled weights are not read, since reading them runs any code they hold; where you "
            f"trust them, let transformers write safetensors: "
            f"AutoModelForCausalLM.from_pretrained(DIRECTORY).save_pretrained(NEW_DIRECTORY)"
        )
    raise InputError(f"{directory}: holds neither {_SINGLE} nor {_INDEX}; name a directory with weights")


def _indexed_files(reader: BoxReader) -> dict[str, str]:
    directory = reader.directory
    files = _read_index(directory / _INDEX)
    named = set(files.values())
    if (directory / _SINGLE).is_file() and _SINGLE not in named:
        raise InputError(
            f"{directory}: holds both {_SINGLE} and {_INDEX}, which names other files; remove what is not the model's"
        )
    stored = {(key, file) for file in sorted(named) for key in reader.keys(file)}
    for key, file in sorted(stored ^ files.items()):
        if (key, file) in stored:
            raise InputError(f"{directory / file}: holds a tensor {key} that {_INDEX} does not say is there")
        raise InputError(f"{directory / file}: holds no tensor {key}, though {_INDEX} says so")
    return files


def _read_index(path: Path) -> dict[str, str]:
    try:
        files = json.loads(path.read_bytes())["weight_map"]
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError, KeyError, TypeError):
        raise InputError(f"{path}: damaged, it has no weight_map from tensors to files") from None
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise InputError(f"{path}: damaged, its weight_map does not give each tensor a file")
    for file in sorted(set(files.values())):
        if Path(file).name != file:
            raise InputError(f"{path}: names {file!r}, which is no file of this directory")
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
    unknown = in_model_order(files.keys() - names)
    if unknown:
        raise InputError(
            f"{directory}: tensor {unknown[0]} in {files[unknown[0]]} has no place in the model "
            f"({len(unknown)} such tensors in all); do config.json and weights belong together?"
        )


def _check_tied_head(
    reader: BoxReader, files: dict[str, str], weights: list[tuple[Piece, Tensor]], config: ModelConfig
) -> None:
    """Take a tied model's head out of the files, or for its embedding; where it has both, they have to be equal."""
    file = files.pop(HEAD, None) if config.tie_word_embeddings else None
    if file is None:
        return
    if EMBEDDING not in files:
        files[EMBEDDING] = file
        return
    embedding, head = _stored(reader, files[EMBEDDING], EMBEDDING), _stored(reader, file, HEAD)
    for box in (piece.box for piece, _ in weights if piece.box.name == EMBEDDING):
        same = head.box.shape == embedding.box.shape == box.shape
        values = [torch.empty(box.size) for _ in range(2)]
        if same:
            reader.read(box, [embedding], values[0])
            reader.read(box, [head.named(EMBEDDING)], values[1])
        if not same or not torch.equal(*values):
            raise InputError(
                f"{reader.directory}: {HEAD} is not {EMBEDDING}, though config.json says tie_word_embeddings; "
                "where the head is meant, set that to false"
            )


def _check_frequencies(reader: BoxReader, files: dict[str, str], config: ModelConfig) -> None:
    """Take rotary frequencies, which old conversions of LLaMA store, out of the files; they follow from rope_theta."""
    expected = inverse_frequencies(config.head_dim, config.rope_theta, None)
    for name in [name for name in files if name.endswith(".rotary_emb.inv_freq")]:
        stored = _stored(reader, files.pop(name), name)
        values = reader.tensor(stored).float()
        stored_as = torch.finfo(getattr(torch, stored.dtype))
        rtol = 1e-5 + 2 * stored_as.eps
        same = values.shape == expected.shape and torch.allclose(values, expected, rtol, stored_as.tiny)
        if not same:
            raise InputError(
                f"{reader.directory / stored.file}: the rotary frequencies {name} are not those of rope_theta "
                f"{config.rope_theta:g}; set rope_theta and rope_scaling in config.json as the model was trained"
            )


def _stored(reader: BoxReader, file: str, name: str) -> StoredBox:
    """The tensor in its file; a tied model's embedding may be there under the head's name."""
    stored = reader.whole(file, name)
    if stored is None and name == EMBEDDING:
        stored = reader.whole(file, HEAD)
    assert stored is not None, "it is among the file's keys"
    return stored.named(name)
