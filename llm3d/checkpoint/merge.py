"""Low-rank adapters added to the weights of their base."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from llm3d.checkpoint.box_files import BoxReader, BoxWriter
from llm3d.checkpoint.hugging_face import EMBEDDING, HEAD, in_model_order, index_of, weight_files
from llm3d.checkpoint.peft import peft_names
from llm3d.config import LoRASettings
from llm3d.config.peft import PREFIX, WEIGHTS
from llm3d.errors import InputError
from llm3d.models.adapters import is_adapter, scale
from llm3d.models.heads import SCORE, HeadName
from llm3d.parallel.boxes import Box


def write_merged(writer: BoxWriter, base: Path, adapter: Path, lora: LoRASettings) -> HeadName:
    """Write W + scale(lora) B A, computed in fp32, for each W with adapters, and what else the base has; -> the head.

    Every tensor keeps its dtype and its file, of which one at a time is in memory. A score head that lies with the
    adapters takes the language head's place. Raises InputError where base and adapters do not belong together.
    """
    weights, trained = BoxReader(base), BoxReader(adapter)
    names = {key.removeprefix(PREFIX) for key in peft_names(trained)}
    places = {name: (file, name) for name, file in weight_files(weights).items()}
    if SCORE in names:
        file, key = places.pop(HEAD, next(reversed(places.values())))
        if EMBEDDING not in places:  # tied, and stored under the head's name
            places[EMBEDDING] = file, key
        places[SCORE] = file, SCORE
    _check_names(adapter, base, names, set(places))
    for file in sorted({file for file, _ in places.values()}):
        entries = []
        for name, (where, key) in places.items():
            if where == file:
                reader, at = (trained, (WEIGHTS, PREFIX + SCORE)) if name in names else (weights, (file, key))
                values = _tensor(reader, *at)
                if _factor(name, "A") in names:
                    values = _merged(values, name, trained, lora)
                entries.append((name, Box.whole(name, values.shape), values))
        writer.tensors(file, entries)
    index = index_of(writer.boxes)
    if index is not None:
        writer.text(*index)
    return "score" if SCORE in places else "language"


def _merged(weight: Tensor, name: str, trained: BoxReader, lora: LoRASettings) -> Tensor:
    a, b = (_tensor(trained, WEIGHTS, PREFIX + _factor(name, which)) for which in "AB")
    if (b.shape[0], a.shape[1]) != weight.shape or not a.shape[0] == b.shape[1] == lora.rank:
        raise InputError(
            f"{trained.directory / WEIGHTS}: adapters {list(b.shape)} and {list(a.shape)} do not fit {name}, "
            f"{list(weight.shape)}, of their base with rank {lora.rank}"
        )
    return torch.addmm(weight.float(), b.float(), a.float(), alpha=scale(lora)).to(weight.dtype)


def _factor(name: str, which: str) -> str:
    return f"{name.removesuffix('.weight')}.lora_{which}.weight"


def _tensor(reader: BoxReader, file: str, key: str) -> Tensor:
    stored = reader.whole(file, key)
    if stored is None:
        raise InputError(f"{reader.directory / file}: holds no tensor {key}, though there should be one")
    return reader.tensor(stored)


def _check_names(adapter: Path, base: Path, names: set[str], weights: set[str]) -> None:
    fitting = {_factor(name, which) for name in weights for which in "AB"}
    for name in in_model_order(names - {SCORE}):
        if name not in fitting:
            what = "its base has no weight for it" if is_adapter(name) else "it is no low-rank adapter"
            raise InputError(f"{adapter / WEIGHTS}: tensor {name} cannot be merged into {base}, {what}")
