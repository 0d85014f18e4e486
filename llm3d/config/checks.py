"""What the settings of different sections ask of each other, and of the number of ranks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from llm3d.config.explain import nearest
from llm3d.config.schedules import SCHEDULES
from llm3d.config.sections import LoRASettings, LossScaleConfig
from llm3d.config.stages import Config
from llm3d.errors import InputError


def check_layout(config: Config, world_size: int | None) -> None:
    """Raise InputError with one line for each pair of settings that do not fit each other."""
    problems = [*_training_problems(config), *_start_problems(config), *_path_problems(config)]
    _refuse(problems or _problems_of_world(config, world_size))


def check_plan(config: Config, world_size: int | None) -> None:
    """Raise InputError likewise for a plan, where a model is only a shape."""
    _refuse([*_training_problems(config)] or _problems_of_world(config, world_size))


def check_generation(config: Config, world_size: int) -> None:
    """Raise InputError likewise for text generation: the model and its layout, nothing that only training needs."""
    problems = [*_model_problems(config), *_stage_problems(config), *_path_problems(config)]
    _refuse(problems or [*_rank_problems(config, world_size)])


def _problems_of_world(config: Config, world_size: int | None) -> list[str]:
    return [] if world_size is None else [*_world_problems(config, world_size)]


def _refuse(problems: list[str]) -> None:
    if problems:
        raise InputError("\n".join(problems))


def _training_problems(config: Config) -> Iterator[str]:
    yield from _model_problems(config)
    yield from _length_problems(config)
    yield from _stage_problems(config)
    yield from _step_problems(config)
    if not config.lora.rank and config.lora != LoRASettings():
        yield "lora: has settings, but lora.rank is 0, which means no adapters; set lora.rank"
    yield from config.problems()


def _model_problems(config: Config) -> Iterator[str]:
    model = config.model
    yield from model.architecture.problems(model, config.parallel.tensor)
    if model.vocab_size is None and config.data.tokenizer is None:
        yield "model.vocab_size: missing; give it, or data.tokenizer to take it from"


def _length_problems(config: Config) -> Iterator[str]:
    model, tensor = config.model, config.parallel.tensor
    if config.data.sequence_length > model.max_position_embeddings:
        yield (
            f"data.sequence_length: {config.data.sequence_length} is above "
            f"model.max_position_embeddings {model.max_position_embeddings}"
        )
    tokens = config.batch.micro * config.data.sequence_length
    fixed = config.reads == "tokens"  # else a microbatch is as long as what it holds
    if fixed and config.parallel.sequence and tokens % tensor:
        yield (
            f"parallel.sequence: parallel.tensor {tensor} does not divide the {tokens} tokens "
            f"of a microbatch (batch.micro x data.sequence_length)"
        )


def _stage_problems(config: Config) -> Iterator[str]:
    parallel, layers = config.parallel, config.model.num_hidden_layers
    stages = parallel.pipeline * parallel.chunks
    count = f"{parallel.pipeline} x parallel.chunks {parallel.chunks} = {stages} stages"
    if parallel.chunks > 1 and not parallel.interleaves:
        able = " or ".join(name for name, rules in SCHEDULES.items() if rules.interleaves)
        yield f"parallel.chunks: {parallel.chunks} needs parallel.schedule {able}, not {parallel.schedule}"
    if parallel.interleaves and (parallel.pipeline == 1 or parallel.chunks == 1):
        yield (
            f"parallel.schedule: {parallel.schedule} needs parallel.pipeline and parallel.chunks of at least 2, "
            f"not {parallel.pipeline} and {parallel.chunks}"
        )
    if parallel.layers_per_stage is not None:
        given = list(parallel.layers_per_stage)
        if len(given) != stages:
            yield f"parallel.layers_per_stage: {given} has {len(given)} entries for parallel.pipeline {count}"
        elif sum(given) != layers:
            yield (
                f"parallel.layers_per_stage: {given} adds up to {sum(given)}, "
                f"not model.num_hidden_layers {layers}"
            )
    if stages > layers:
        yield f"parallel.pipeline: {count}, more than model.num_hidden_layers {layers}"


def _step_problems(config: Config) -> Iterator[str]:
    optim, precision = config.optim, config.precision
    if precision.gradients == "bf16" and precision.compute != "bf16":
        yield f"precision.gradients: bf16 needs precision.compute bf16, not {precision.compute}"
    scale = precision.loss_scale
    if scale != LossScaleConfig() and precision.compute != "fp16":
        yield f"precision.loss_scale: needs precision.compute fp16, not {precision.compute}; leave it out"
    elif scale.initial < scale.minimum:
        yield f"precision.loss_scale.initial: {scale.initial} is below precision.loss_scale.minimum {scale.minimum}"
    if config.zero.prefetch != 1 and config.zero.stage != 3:
        yield f"zero.prefetch: {config.zero.prefetch} needs zero.stage 3, not {config.zero.stage}"
    if config.zero.offload == "none" and config.zero.offload_fraction != 1.0:
        yield f"zero.offload_fraction: {config.zero.offload_fraction} needs zero.offload optimizer"
    if optim.min_lr > optim.lr:
        yield f"optim.min_lr: {optim.min_lr} is above optim.lr {optim.lr}"
    if optim.decay_steps is not None and optim.schedule != "wsd":
        yield f"optim.decay_steps: needs optim.schedule wsd, not {optim.schedule}; set it to null"
    if optim.decay_ratio is not None and optim.schedule != "wsd":
        yield f"optim.decay_ratio: needs optim.schedule wsd, not {optim.schedule}; set it to null"
    if optim.warmup_ratio is not None and optim.warmup_steps:
        yield f"optim.warmup_ratio: cannot be given with optim.warmup_steps {optim.warmup_steps}; set one to 0 or null"
    if optim.decay_ratio is not None and optim.decay_steps is not None:
        yield f"optim.decay_ratio: cannot be given with optim.decay_steps {optim.decay_steps}; set one to null"
    if (optim.warmup_ratio or 0) + (optim.decay_ratio or 0) > 1:
        yield f"optim.warmup_ratio: {optim.warmup_ratio} + optim.decay_ratio {optim.decay_ratio} is above 1"
    yield from _interval_problems(config)


def _interval_problems(config: Config) -> Iterator[str]:
    evaluations, checkpoint = config.train.evaluations, config.checkpoint
    if evaluations.is_given and not config.data.valid:
        name = "eval_every" if evaluations.steps else "eval_every_epochs"
        yield f"train.{name}: {evaluations.steps or evaluations.epochs} needs data.valid, which is empty"
    for name, interval in (("train.eval_every", evaluations), ("checkpoint.every", checkpoint.saves)):
        if interval.steps is not None and interval.epochs is not None:
            yield f"{name}_epochs: cannot be given with {name} {interval.steps}; set one to null"
    if checkpoint.best is not None and not evaluations.is_given:
        yield f"checkpoint.best: {checkpoint.best} is measured by evaluations; set train.eval_every"
    if checkpoint.greater_is_better is not None and checkpoint.best is None:
        yield "checkpoint.greater_is_better: needs checkpoint.best, the name of a metric"
    if config.train.patience is not None and checkpoint.best is None:
        yield f"train.patience: {config.train.patience} needs checkpoint.best, such as valid_loss"


def _start_problems(config: Config) -> Iterator[str]:
    if config.lora.rank and config.model.path is None:
        yield "lora.rank: adapters need a model to adapt; set model.path"
    if config.reads != "tokens" and config.model.path is None:
        yield "model.path: missing; name the model to start from"


def _path_problems(config: Config) -> Iterator[str]:
    tokenizer, resume = config.data.tokenizer, config.checkpoint.resume
    if tokenizer is not None and not Path(tokenizer).exists():
        yield f"data.tokenizer: no file or directory {tokenizer!r}"
    if resume not in ("auto", "none") and not Path(resume).is_dir():
        hint = nearest(resume, ["auto", "none"])
        yield f"checkpoint.resume: {resume!r} is neither auto, none nor a checkpoint's directory{hint}"


def _rank_problems(config: Config, world_size: int) -> Iterator[str]:
    parallel = config.parallel
    ranks = parallel.tensor * parallel.pipeline
    if world_size < 1 or world_size % ranks:
        layout = f"tensor {parallel.tensor} x pipeline {parallel.pipeline} = {ranks}"
        yield f"world size {world_size} is not a multiple of {layout}"


def _world_problems(config: Config, world_size: int) -> Iterator[str]:
    problems = [*_rank_problems(config, world_size)]
    yield from problems
    parallel, batch = config.parallel, config.batch
    if problems:
        return
    if config.reads != "tokens":
        return
    data = config.data_parallel_size(world_size)
    if batch.global_size % (batch.micro * data):
        together = f"batch.micro {batch.micro} x data-parallel size {data} = {batch.micro * data}"
        yield f"batch.global: {batch.global_size} is not a multiple of {together}"
    elif config.num_microbatches(world_size) % parallel.microbatch_multiple:
        yield (
            f"parallel.schedule: {parallel.schedule} needs microbatches in multiples of parallel.pipeline "
            f"{parallel.pipeline}, not {config.num_microbatches(world_size)} "
            f"(batch.global / batch.micro / data-parallel size {data})"
        )
