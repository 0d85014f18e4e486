"""A checkpoint as a plain Hugging Face directory: its model, or its adapters merged into their base."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import torch

from llm3d.checkpoint import manifest
from llm3d.checkpoint.box_files import BoxReader, BoxWriter
from llm3d.checkpoint.hugging_face import config_of_scores, weight_files, with_tokens
from llm3d.checkpoint.load import checked_weights
from llm3d.checkpoint.merge import write_merged
from llm3d.config import LoRASettings, ModelConfig
from llm3d.config.explain import validate
from llm3d.config.hugging_face import hugging_face_shape
from llm3d.config.peft import peft_settings
from llm3d.errors import InputError
from llm3d.files import new_directory, read_json
from llm3d.parallel.boxes import Box
from llm3d.stages.reward import padding_token
from llm3d.text.tokenizer import load_tokenizer
from llm3d.train.optimizer import AVERAGE

CONFIG, GENERATION = "config.json", "generation_config.json"
TOKENIZERS = ("tokenizer.json", "tokenizer.model")


def export(
    source: Path, output: Path, base: str | None = None, overwrite: bool = False, average: bool = False
) -> str:
    """Write `output`, complete or not at all; -> what it is, for people.

    source: a checkpoint, or a PEFT directory.  base: of the adapters, where they do not name it themselves.
    average: the average of the weights over training (ppo.ema) in their place. Raises InputError.
    """
    adapter = _adapter(source)
    if adapter is not None and average:
        raise InputError("--average: of adapters no average can be exported; leave it out")
    if adapter is None and base is not None:
        raise InputError(f"--base: {source} holds a whole model, which needs none")
    taken = checked_weights(source, "model") if adapter is None else _base(adapter, base)
    for used in (taken, source, adapter):
        if used is not None and output.resolve() == used.resolve():
            raise InputError(f"--output: {output} is what is exported; name another directory")
    try:
        with new_directory(output, overwrite, CONFIG) as partial:
            if average:
                _write_average(source, taken, partial)
                return f"{output}: the average of the weights of {source}"
            if adapter is None:
                _copy(taken, partial, [path.name for path in taken.iterdir()])
                return f"{output}: the model of {source}"
            _merge(taken, adapter, partial)
            return f"{output}: the adapters of {source} merged into {taken}"
    except OSError as error:
        raise InputError(f"{error.filename or output}: {error.strerror or error}") from None


def _write_average(checkpoint: Path, model: Path, output: Path) -> None:
    """The files of the model, with the average of each tensor, which lies with the optimizer's state."""
    contents, reader, weights = manifest.read_manifest(checkpoint), BoxReader(checkpoint), BoxReader(model)
    files = weight_files(weights)
    writer = BoxWriter(output)
    for file in sorted(set(files.values())):
        entries = []
        for name in (name for name, where in files.items() if where == file):
            if f"{AVERAGE}/{name}" not in contents.tensors:
                raise InputError(
                    f"{checkpoint}: holds no average of {name}; the run has to be one with ppo.ema"
                )
            stored = weights.whole(file, name)
            assert stored is not None, "the file names what it has"
            box = Box.whole(name, stored.box.shape)
            values = torch.empty(box.shape)
            at = replace(box, name=f"{AVERAGE}/{name}")
            boxes = contents.boxes(at.name)
            for one in boxes:
                reader.check(one)
            reader.read(at, boxes, values)
            entries.append((name, box, values.to(weights.tensor(stored).dtype)))
        writer.tensors(file, entries)
    if writer.failure is not None:
        raise InputError(writer.failure)
    _copy(model, output, [path.name for path in model.iterdir() if path.suffix != ".safetensors"])


def _adapter(source: Path) -> Path | None:
    """The PEFT directory that the source is or has, if it is undamaged; None for a checkpoint of a whole model."""
    if (source / manifest.FILE).is_file():
        return checked_weights(source, "adapter") if (source / "adapter").is_dir() else None
    if (source / "adapter_config.json").is_file():
        return source
    raise InputError(f"{source}: neither a checkpoint nor a PEFT directory; name RUN/checkpoints/step-...")


def _base(adapter: Path, given: str | None) -> Path:
    """The directory with the weights that the adapters are for."""
    base = given or read_json(adapter / "adapter_config.json").get("base_model_name_or_path")
    if base is None or not Path(base).is_dir():
        named = f"{base} is no directory here" if base else f"{adapter} names no model"
        raise InputError(f"--base: {named}; give the directory of the model that the adapters are for")
    return checked_weights(Path(base), "model")


def _merge(base: Path, adapter: Path, output: Path) -> None:
    settings = peft_settings(str(adapter))
    lora = validate(LoRASettings, settings, ("lora",), source=f" (in {adapter})")
    shape = validate(ModelConfig, hugging_face_shape(base / CONFIG), ("model",))
    with_tokenizer = next(
        (at for at in (adapter, base) if any((at / name).is_file() for name in TOKENIZERS)), None
    )
    writer = BoxWriter(output)
    head = write_merged(writer, base, adapter, lora)
    if head == "language":
        tokenizer = load_tokenizer(with_tokenizer) if with_tokenizer else None
        tokens = (tokenizer.bos_id, tokenizer.end_ids) if tokenizer else (None, ())
        contents = with_tokens(read_json(base / CONFIG), read_json(base / GENERATION), *tokens)
        for name, content in zip((CONFIG, GENERATION), contents, strict=True):
            if content:
                writer.text(name, json.dumps(content, indent=2) + "\n")
    else:
        padding = (
            padding_token(shape, load_tokenizer(with_tokenizer)) if with_tokenizer else shape.pad_token_id
        )
        config = config_of_scores(read_json(base / CONFIG), padding)
        writer.text(CONFIG, json.dumps(config, indent=2) + "\n")
    if writer.failure is not None:
        raise InputError(writer.failure)
    if with_tokenizer is not None:
        load_tokenizer(with_tokenizer).save_to(output)


def _copy(source: Path, output: Path, names: list[str]) -> None:
    """Of these files, those that there are."""
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, output / name)
