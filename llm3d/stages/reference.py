"""The reference of preference losses: the starting model, asked at each step or once before training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from llm3d.checkpoint.box_files import BoxReader
from llm3d.checkpoint.starting import load_first_adapters, load_first_weights, seen_by_first_rank
from llm3d.config import Config
from llm3d.config.hugging_face import hugging_face_directory
from llm3d.config.peft import adapter_directory
from llm3d.data.conversations import ChatData
from llm3d.data.order import short_digest
from llm3d.data.packed import PackedBatch
from llm3d.data.samples import SampleSet
from llm3d.errors import InputError
from llm3d.files import atomic_file
from llm3d.parallel.agreement import input_errors_on_all
from llm3d.parallel.cross_entropy import TokenTerms
from llm3d.stages.stage import ModelRole, Models, largest_microbatch
from llm3d.train.frozen import FrozenModel
from llm3d.train.objective import Objective
from llm3d.train.trainer import ShardedModel

_STORED = "log_probabilities"


def sequence_log_probabilities(output: TokenTerms, batch: PackedBatch) -> Tensor:
    """The sum over each sequence's targets of their log-probabilities: fp32 [sequences]."""
    return batch.sum_by_sequence(output.log_probabilities)


class LiveReference:
    """The starting model, which completes microbatches with its log-probabilities at each step.

    It is a model of its own, or, where the trained model has adapters, that model without them.
    """

    def __init__(self, model: ShardedModel) -> None:
        self.model = model
        self.frozen = (
            FrozenModel(model, "in_trained_model")
            if model.config.lora.rank
            else FrozenModel(ShardedModel(model.config, model.mesh, model.objective), "on_device")
        )

    def prepare(self) -> None:
        load = load_first_adapters if self.frozen.model is self.model else load_first_weights
        load(self.frozen.model)
        self.frozen.freeze()

    def complete(self, microbatches: Sequence[PackedBatch]) -> Sequence[PackedBatch]:
        """Nothing is random in the reference. Its log-probabilities are known on the last pipeline stage alone."""
        log_probabilities = self.log_probabilities(
            [replace(batch, keys=None, noise=None) for batch in microbatches]
        )
        if log_probabilities is None:
            return microbatches
        return [
            replace(batch, reference=known)
            for batch, known in zip(microbatches, log_probabilities, strict=True)
        ]

    def log_probabilities(self, microbatches: Sequence[PackedBatch]) -> list[Tensor] | None:
        """Of each microbatch's sequences, fp32 [sequences]; None but on the last pipeline stage."""
        with self.frozen.loaded() as reference:
            return reference.outputs(microbatches, sequence_log_probabilities)


def with_reference_model(objective: Objective, config: Config) -> Models:
    """The trained model, and a `LiveReference` where it is a model of its own."""
    microbatch = largest_microbatch(config)
    roles = [ModelRole("model", "trained", config, objective, microbatch)]
    if not config.lora.rank:
        roles.append(ModelRole("reference", "frozen", config, objective, microbatch))
    return Models(roles)


class CachedReference:
    """The starting model's log-probabilities, computed before training and kept in the run directory.

    Microbatches bring them along, for the data know them.
    """

    def __init__(self, model: ShardedModel, data: ChatData) -> None:
        self.model, self.data = model, data

    def prepare(self) -> None:
        model, data = self.model, self.data
        config, mesh = model.config, model.mesh
        keys = [reference_key(config, samples) for samples in data.sets]
        paths = [Path(config.run.dir) / f"reference-{key}.safetensors" for key in keys]
        missing = [number for number, path in enumerate(paths) if not seen_by_first_rank(path, mesh)]
        if missing:
            load_first_weights(model)
        for number in missing:
            log_probabilities = reference_log_probabilities(model, data, number)
            with input_errors_on_all(mesh.everyone):
                if mesh.rank == 0:
                    _write(paths[number], log_probabilities)
        with input_errors_on_all(mesh.everyone):
            data.reference = [_read(path) for path in paths]

    def complete(self, microbatches: Sequence[PackedBatch]) -> Sequence[PackedBatch]:
        return microbatches


@torch.no_grad()
def reference_log_probabilities(model: ShardedModel, data: ChatData, number: int) -> Tensor:
    """Of all sequences of a set, by the weights as they are: fp32 [sequences], on every rank."""
    mesh, log_probabilities = model.mesh, torch.zeros(data.sets[number].num_sequences)
    for packed in data.everything(number, mesh):
        batches = [batch.to(mesh.device) for _, batch in packed]
        outputs = model.outputs(batches, sequence_log_probabilities)
        if outputs is None or mesh.tensor_rank:
            continue
        for (places, _), output in zip(packed, outputs, strict=True):
            spans = [data.sequences(place) for place in places]
            lengths = [span.stop - span.start for span in spans]
            for span, part in zip(spans, output.cpu().split(lengths), strict=True):
                log_probabilities[span] = part
    dist.all_reduce(log_probabilities, group=mesh.everyone)
    return log_probabilities


def reference_key(config: Config, samples: SampleSet) -> str:
    """16 hex digits that change when the samples, the starting model or its precision do."""
    assert config.model.path is not None, "checked with the settings"
    directory = hugging_face_directory(config.model.path)
    directories = [directory, *([adapter_directory(config.lora.path)] if config.lora.path else [])]
    patterns = ("*.safetensors", "config.json", "adapter_config.json")
    files = sorted(file for each in directories for pattern in patterns for file in each.glob(pattern))
    described = [
        samples.digest,
        [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files],
        [str(each.resolve()) for each in directories],
        config.precision.compute,
    ]
    return short_digest(described)


def _read(path: Path) -> Tensor:
    reader = BoxReader(path.parent)
    stored = reader.whole(path.name, _STORED)
    assert stored is not None, "the file's name says what is in it"
    return reader.tensor(stored)


def _write(path: Path, log_probabilities: Tensor) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as partial:
            save_file({_STORED: log_probabilities}, partial)
    except OSError as error:
        raise InputError(f"run.dir: {path}: {error.strerror}; name a directory that can be written") from None
