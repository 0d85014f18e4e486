"""Direct preference optimisation: a policy that prefers the chosen replies more than its reference does.

Rafailov et al. 2023. With r(y) = beta (log p(y) - log p_reference(y)), the implicit reward of a reply, the loss of a
pair is -log sigmoid(r(chosen) - r(rejected)), or one of its relatives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import logsigmoid

from llm3d.checkpoint.box_files import BoxReader
from llm3d.checkpoint.starting import load_first_adapters, load_first_weights, seen_by_first_rank
from llm3d.config import Config, DPOConfig, DPOSettings
from llm3d.config.hugging_face import hugging_face_directory
from llm3d.config.peft import adapter_directory
from llm3d.data.conversations import ChatData, open_chat
from llm3d.data.order import short_digest
from llm3d.data.packed import PackedBatch
from llm3d.data.samples import SampleSet
from llm3d.errors import InputError
from llm3d.files import atomic_file
from llm3d.models.heads import HeadName
from llm3d.parallel.agreement import input_errors_on_all
from llm3d.parallel.cross_entropy import TokenTerms
from llm3d.stages.stage import ModelRole, Models, ModelTask, Stage, largest_microbatch, one_model
from llm3d.train.frozen import FrozenModel
from llm3d.train.learner import Reference
from llm3d.train.objective import Objective
from llm3d.train.trainer import ShardedModel

_STORED = "log_probabilities"


def dpo_loss(difference: Tensor, settings: DPOSettings) -> Tensor:
    """The loss of each pair, fp32 [pairs].

    difference: [pairs], (log p - log p_reference)(chosen) - the same of rejected; per token for ipo.

    sigmoid: Rafailov et al. 2023, with label smoothing Mitchell 2023 (cDPO).  robust: Chowdhury et al. 2024.
    hinge: Zhao et al. 2023 (SLiC).  ipo: Azar et al. 2023, the distance to 1 / (2 beta).
    """
    logits, flipped = settings.beta * difference, settings.label_smoothing
    if settings.loss == "hinge":
        return torch.relu(1 - logits)
    if settings.loss == "ipo":
        return (difference - 1 / (2 * settings.beta)).square()
    if settings.loss == "robust":
        return (-(1 - flipped) * logsigmoid(logits) + flipped * logsigmoid(-logits)) / (1 - 2 * flipped)
    return -(1 - flipped) * logsigmoid(logits) - flipped * logsigmoid(-logits)


def sequence_log_probabilities(output: TokenTerms, batch: PackedBatch) -> Tensor:
    """The sum over each sequence's targets of their log-probabilities: fp32 [sequences]."""
    return batch.sum_by_sequence(output.log_probabilities)


@dataclass(frozen=True)
class PreferenceObjective:
    """`dpo_loss` over a batch's pairs, and what TRL's users watch, under the names that they know.

    nll_loss is TRL's: over all tokens of the chosen replies alike, whatever dpo.rpo_mean adds to the loss.
    """

    settings: DPOSettings
    head: HeadName = "language"
    unit: str = "sample"
    sums: tuple[str, ...] = (
        "rewards/chosen",
        "rewards/rejected",
        "rewards/accuracies",
        "rewards/margins",
        "logps/chosen",
        "logps/rejected",
        "nll_loss",
        "chosen_targets",
    )
    maxima: tuple[str, ...] = ()

    def count(self, batch: Any) -> int:
        return batch.num_samples

    def __call__(self, output: TokenTerms, batch: PackedBatch) -> Tensor:
        settings, weights = self.settings, batch.pair_weights
        if not batch.num_sequences:  # padding alone: a loss of 0 that hangs on the model
            return (0 * output.log_probabilities.sum()).expand(1 + len(self.sums))
        log_p = sequence_log_probabilities(output, batch)
        above_reference = log_p - (0.0 if batch.reference is None else batch.reference)
        lengths = batch.target_counts
        compared = above_reference
        if settings.loss == "ipo" or settings.length_normalized:
            compared = above_reference / lengths
        difference = compared[batch.better] - compared[batch.worse]
        per_sequence = settings.rpo_mean == "sequence"
        length = lengths if per_sequence else batch.step_chosen_targets / batch.step_samples
        nll = -(weights * (log_p / length)[batch.better]).sum()
        loss = (weights * dpo_loss(difference, settings)).sum() + settings.rpo_alpha * nll
        rewards = settings.beta * above_reference
        chosen, rejected = rewards[batch.better], rewards[batch.worse]
        reported = torch.stack(
            [
                chosen,
                rejected,
                (chosen > rejected).float(),
                chosen - rejected,
                log_p[batch.better],
                log_p[batch.worse],
                -log_p[batch.better],
                lengths[batch.better],
            ]
        )
        return torch.cat([loss[None], (weights * reported).sum(1).detach()])

    def report(self, means: dict[str, float]) -> dict[str, float]:
        *others, (_, nll), (_, targets) = means.items()
        return dict(others) | {"nll_loss": nll / targets}


def open_stage(config: DPOConfig, training: bool = True) -> ModelTask:
    """Open tokenizer, template and data. Raises InputError where they cannot be used."""
    config, tokenizer, data = open_chat(config, "comparison", training)
    references: dict[str, Callable[[ShardedModel], Reference] | None] = {
        "cached": partial(CachedReference, data=data),
        "live": LiveReference,
        "none": None,
    }
    objective = PreferenceObjective(config.dpo)
    return ModelTask(config, tokenizer, data, objective, references[config.dpo.reference])


def models(config: DPOConfig) -> Models:
    """With the reference where it is a model of its own."""
    objective = PreferenceObjective(config.dpo)
    if config.dpo.reference == "live":
        return with_starting_model(objective, config)
    return one_model(lambda config: objective)(config)


STAGE = Stage(DPOConfig, open_stage, models)


# ---- the reference, asked at each step ----


class LiveReference:
    """The starting model, which completes microbatches with its log-probabilities."""

    def __init__(self, model: ShardedModel) -> None:
        self.model, self.frozen = model, starting_model(model)

    def prepare(self) -> None:
        load_starting_model(self.frozen, self.model)

    def complete(self, microbatches: Sequence[PackedBatch]) -> Sequence[PackedBatch]:
        """They are known on the last pipeline stage alone."""
        with self.frozen.loaded() as reference:
            found = reference.outputs(without_noise(microbatches), sequence_log_probabilities)
        if found is None:
            return microbatches
        return [replace(batch, reference=known) for batch, known in zip(microbatches, found, strict=True)]


def starting_model(model: ShardedModel) -> FrozenModel:
    """A model of its own, or, where the model has adapters, that model without them."""
    if model.config.lora.rank:
        return FrozenModel(model, "in_trained_model")
    return FrozenModel(ShardedModel(model.config, model.mesh, model.objective), "on_device")


def load_starting_model(frozen: FrozenModel, model: ShardedModel) -> None:
    """Load what `starting_model` made of the model, before the model's own weights are loaded."""
    load = load_first_adapters if frozen.model is model else load_first_weights
    load(frozen.model)
    frozen.freeze()


def without_noise(microbatches: Sequence[PackedBatch]) -> Sequence[PackedBatch]:
    """Microbatches as a model sees them that is not trained."""
    return [replace(batch, keys=None, noise=None) for batch in microbatches]


def with_starting_model(objective: Objective, config: Config) -> Models:
    """The trained model, and the starting one where it is a model of its own."""
    microbatch = largest_microbatch(config)
    roles = [ModelRole("model", "trained", config, objective, microbatch)]
    if not config.lora.rank:
        roles.append(ModelRole("reference", "frozen", config, objective, microbatch))
    return Models(roles)


# ---- the reference, known beforehand ----


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
            found = reference_log_probabilities(model, data, number)
            with input_errors_on_all(mesh.everyone):
                if mesh.rank == 0:
                    _write(paths[number], found)
        with input_errors_on_all(mesh.everyone):
            data.reference = [_read(path) for path in paths]

    def complete(self, microbatches: Sequence[PackedBatch]) -> Sequence[PackedBatch]:
        return microbatches


@torch.no_grad()
def reference_log_probabilities(model: ShardedModel, data: ChatData, number: int) -> Tensor:
    """Of all sequences of a set, by the weights as they are: fp32 [sequences], on every rank."""
    mesh, found = model.mesh, torch.zeros(data.sets[number].num_sequences)
    for packed in data.everything(number, mesh):
        batches = [batch.to(mesh.device) for _, batch in packed]
        outputs = model.outputs(batches, sequence_log_probabilities)
        if outputs is None or mesh.tensor_rank:
            continue
        for (places, _), output in zip(packed, outputs, strict=True):
            spans = [data.sequences(place) for place in places]
            lengths = [span.stop - span.start for span in spans]
            for span, part in zip(spans, output.cpu().split(lengths), strict=True):
                found[span] = part
    dist.all_reduce(found, group=mesh.everyone)
    return found


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


def _write(path: Path, found: Tensor) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as partial:
            save_file({_STORED: found}, partial)
    except OSError as error:
        raise InputError(f"run.dir: {path}: {error.strerror}; name a directory that can be written") from None
