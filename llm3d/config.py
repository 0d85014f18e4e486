"""Every setting: typed, frozen, and checked across sections before any process group is made.

`load_config` reads YAML and `section.key=value` overrides into a `Config`; `config_to_yaml` writes one back.
Whatever the user got wrong is an `InputError` with one line for each setting at fault: its path, what was
given, what is allowed, and the nearest valid name. Imports no torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from llm3d.errors import InputError
from llm3d.presets import PRESETS, hugging_face_shape
from llm3d.settings_file import read_settings, settings_to_yaml


def _whole(value: object) -> object:
    """1e6 is a float in YAML; where a whole number is asked for, it is one."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, Field(ge=0), BeforeValidator(_whole)]
Positive = Annotated[int, Field(ge=1), BeforeValidator(_whole)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Name = Annotated[str, Field(min_length=1)]


class Section(BaseModel):
    # Strict: "8" is not a number and true is not 1. Docstrings of fields go into the JSON Schema.
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


# ---- model ----


class RopeScaling(Section):
    """How the rotary frequencies are stretched beyond the positions that the model first saw."""

    rope_type: Literal["linear", "llama3"]
    factor: float = Field(ge=1)
    low_freq_factor: float | None = Field(None, gt=0)
    high_freq_factor: float | None = Field(None, gt=0)
    original_max_position_embeddings: Positive | None = None

    @model_validator(mode="before")
    @classmethod
    def _old_name(cls, given: Any) -> Any:
        if isinstance(given, dict) and "type" in given and "rope_type" not in given:
            return {"rope_type": given["type"]} | {key: given[key] for key in given if key != "type"}
        return given

    @model_validator(mode="after")
    def _fields_fit_the_type(self) -> RopeScaling:
        names = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        for name in names:
            if (getattr(self, name) is None) == (self.rope_type == "llama3"):
                raise ValueError(f"rope_type {self.rope_type} {_needs(self.rope_type == 'llama3')} {name}")
        if self.low_freq_factor and self.high_freq_factor and self.low_freq_factor >= self.high_freq_factor:
            raise ValueError("low_freq_factor is not below high_freq_factor")
        return self


def _needs(needed: bool) -> str:
    return "needs" if needed else "takes no"


def _no_default_scaling(value: object) -> object:
    """transformers writes `rope_type: default` for no scaling."""
    if isinstance(value, dict) and value.get("rope_type", value.get("type")) == "default":
        return None
    return value


class ModelConfig(Section):
    """A LLaMA. The names are those of transformers' LlamaConfig."""

    path: Name | None = None
    """A Hugging Face directory: its config.json gives the shape, its weights are the start."""
    vocab_size: Positive | None = None
    """Null takes it from data.tokenizer."""
    hidden_size: Positive
    intermediate_size: Positive
    num_hidden_layers: Positive
    num_attention_heads: Positive
    num_key_value_heads: Positive = Field(default_factory=lambda data: data["num_attention_heads"])
    """Below num_attention_heads: grouped-query attention. Default: num_attention_heads."""
    head_dim: Positive = Field(
        default_factory=lambda data: data["hidden_size"] // data["num_attention_heads"]
    )
    """Default: hidden_size / num_attention_heads."""
    max_position_embeddings: Positive = 2048
    rope_theta: float = Field(10000.0, gt=0)
    rope_scaling: Annotated[RopeScaling | None, BeforeValidator(_no_default_scaling)] = None
    rms_norm_eps: float = Field(1e-5, gt=0)
    tie_word_embeddings: bool = False
    initializer_range: float = Field(0.02, gt=0)
    bos_token_id: Whole | None = None
    eos_token_id: Whole | tuple[Whole, ...] | None = None

    def num_parameters(self) -> int:
        """The exact number of weights, tied embeddings counted once."""
        if self.vocab_size is None:
            raise ValueError("model.vocab_size is not known before the tokenizer is read")
        heads = self.num_attention_heads + self.num_key_value_heads  # q and o, k and v
        attention = 2 * self.hidden_size * self.head_dim * heads
        mlp = 3 * self.hidden_size * self.intermediate_size
        layer = attention + mlp + 2 * self.hidden_size
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return embeddings + self.num_hidden_layers * layer + self.hidden_size


# ---- the other sections ----


class RunConfig(Section):
    dir: Name
    """Where config.yaml, metrics.jsonl, TensorBoard events and checkpoints go."""
    seed: Annotated[int, Field(ge=0, lt=2**63), BeforeValidator(_whole)] = 1234


class ParallelConfig(Section):
    """Degrees; data parallelism is what is left of the world size."""

    tensor: Positive = 1
    pipeline: Positive = 1
    chunks: Positive = 1
    """Model chunks on each pipeline rank; above 1 with the interleaved schedule."""
    schedule: Literal["gpipe", "1f1b", "interleaved"] = "1f1b"
    sequence: bool = False
    """Split activations outside attention and MLP over the tensor group (sequence parallelism)."""
    layers_per_stage: tuple[Positive, ...] | None = None
    """Layers of each of the pipeline x chunks stages, in model order. Default: as even as possible."""


class ZeroConfig(Section):
    """What data ranks share out instead of each holding a copy. Rajbhandari et al. 2020."""

    stage: Literal[0, 1, 2, 3] = 0
    """1: the optimizer's state; 2: gradients too; 3: parameters too."""
    prefetch: Positive = 1
    """Stage 3: how many layers ahead parameters are gathered."""
    offload: Literal["none", "optimizer"] = "none"
    """optimizer: master weights and moments are in host memory, and the host's processor steps them."""
    offload_fraction: float = Field(1.0, gt=0, le=1)
    """Share of the optimizer's state that offload takes; the rest stays on the device."""


class LossScaleConfig(Section):
    """What the loss is multiplied by in fp16, so that small gradients do not become zero."""

    initial: float = Field(2.0**32, gt=0)
    """Large, as the loss is a mean over all tokens of a step: the first steps halve it until gradients fit."""
    growth_interval: Positive = 1000
    """Steps without overflow after which it doubles."""
    hysteresis: Positive = 2
    """Overflows since it last doubled before it is halved."""
    minimum: float = Field(1.0, gt=0)
    """Below this, training is aborted."""


class PrecisionConfig(Section):
    compute: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of forward and backward; master weights are fp32. fp16 scales the loss."""
    gradients: Literal["fp32", "bf16"] = "fp32"
    """What gradients are summed in, over microbatches and over ranks."""
    moments: Literal["fp32", "bf16"] = "fp32"
    """What the optimizer's moments are kept in; bf16 is rounded stochastically."""
    loss_scale: LossScaleConfig = LossScaleConfig()


class DataSource(Section):
    path: Name
    """Megatron data: the path of a .bin/.idx pair without its ending."""
    weight: float = Field(1.0, gt=0)
    """Share of the samples, relative to the other sources."""

    @model_validator(mode="before")
    @classmethod
    def _bare_path(cls, given: Any) -> Any:
        return {"path": given} if isinstance(given, str) else given


def _as_list(value: object) -> object:
    values = [value] if isinstance(value, str | dict) else value
    return tuple(values) if isinstance(values, list) else values


class DataConfig(Section):
    train: Annotated[tuple[DataSource, ...], Field(min_length=1), BeforeValidator(_as_list)]
    valid: Annotated[tuple[DataSource, ...], BeforeValidator(_as_list)] = ()
    sequence_length: Positive
    tokenizer: Name | None = None
    """A tokenizer.model or tokenizer.json, or the directory of one."""
    split_documents: bool = True
    """Attention does not cross from one document into the next."""


class BatchConfig(Section):
    global_size: Positive = Field(alias="global")
    """Sequences a step, over all ranks."""
    micro: Positive = 1
    """Sequences a microbatch, on one data-parallel rank."""


class LossConfig(Section):
    """What is added to the cross-entropy that is trained on; evaluations are without."""

    z_loss: float = Field(0.0, ge=0)
    """Times the squared logarithm of the softmax's normaliser: keeps logits from drifting."""
    label_smoothing: Fraction = 0.0
    """Share of each target's probability that is spread over the whole vocabulary."""


class KernelsConfig(Section):
    backend: Literal["auto", "native", "transformer_engine", "apex", "reference"] = "auto"
    """Which code computes norms, rotary positions, activations, losses and AdamW; auto: LLM3D_KERNELS, or the
    fastest that is there; native: llm3d's own, or an error; reference: plain PyTorch."""


class OptimConfig(Section):
    """AdamW and its learning rate."""

    lr: float = Field(gt=0)
    min_lr: float = Field(default_factory=lambda data: float(f"{0.1 * data['lr']:.15g}"), ge=0)
    """The learning rate at the last step. Default: 0.1 x lr."""
    warmup_steps: Whole = 0
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    decay_steps: Positive | None = None
    """Length of the decay at the end of wsd. Default: a tenth of train.steps."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    clip_grad_norm: float | None = Field(1.0, gt=0)


class TrainConfig(Section):
    steps: Positive
    """The learning-rate schedule ends here."""
    stop_after: Positive | None = None
    """Save and end after this step; the same command without it goes on. Null: train to the last."""
    eval_every: Positive | None = None
    """Steps between evaluations on data.valid. Null: none."""
    eval_steps: Positive | None = None
    """Batches of an evaluation. Null: all of data.valid."""


class CheckpointConfig(Section):
    every: Positive | None = None
    """Steps between checkpoints. Null: only at the end."""
    keep: Positive | None = None
    """How many of the latest to keep. Null: all."""
    resume: Name = "auto"
    """auto (the latest in run.dir), none, or the path of a checkpoint."""


class LogConfig(Section):
    every: Positive = 1
    """Steps between lines of metrics.jsonl."""
    tensorboard: bool = True


class Config(Section):
    """All settings of a run."""

    run: RunConfig
    model: ModelConfig
    parallel: ParallelConfig
    zero: ZeroConfig
    precision: PrecisionConfig
    recompute: Literal["none", "selective", "full"] = "none"
    data: DataConfig
    batch: BatchConfig
    loss: LossConfig
    optim: OptimConfig
    kernels: KernelsConfig
    train: TrainConfig
    checkpoint: CheckpointConfig
    log: LogConfig

    def data_parallel_size(self, world_size: int) -> int:
        return world_size // (self.parallel.tensor * self.parallel.pipeline)

    def num_microbatches(self, world_size: int) -> int:
        """Microbatches a step on each data-parallel rank."""
        return self.batch.global_size // (self.batch.micro * self.data_parallel_size(world_size))


# ---- loading and writing ----


def load_config(path: str | Path, overrides: Sequence[str] = (), world_size: int | None = 1) -> Config:
    """The settings in a YAML file, with `section.key=value` overrides on top.

    An override replaces what it names; one of model.preset or model.path replaces the file's model section.
    World size None leaves out the checks that need one. Raises InputError.
    """
    return make_config(read_settings(path, overrides), world_size)


def make_config(settings: Mapping[Any, Any], world_size: int | None = 1) -> Config:
    """The settings in a dictionary as YAML would give it. Raises InputError."""
    filled = _with_defaults(settings)
    if isinstance(filled.get("model"), dict):
        filled["model"] = _resolve_model(filled["model"])
    config = _validate(Config, filled)
    check_layout(config, world_size)
    return config


def check_layout(config: Config, world_size: int | None) -> None:
    """Raise InputError with a line for each way in which the settings do not fit each other."""
    problems = [*_model_problems(config), *_stage_problems(config), *_step_problems(config)]
    problems += _path_problems(config)
    if not problems and world_size is not None:
        problems += _world_problems(config, world_size)
    if problems:
        raise InputError("\n".join(problems))


def config_to_yaml(config: Config) -> str:
    """The resolved settings; loading them gives an equal Config."""
    return settings_to_yaml(config.model_dump(mode="json", by_alias=True))


def with_vocab_size(config: Config, vocab_size: int) -> Config:
    """The same settings with the vocabulary size that the tokenizer has."""
    return config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": vocab_size})})


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a settings file, for editors."""
    schema = Config.model_json_schema(by_alias=True)
    model, source = schema["$defs"]["ModelConfig"], schema["$defs"]["DataSource"]
    del model["required"]  # model.preset or model.path may stand in for the shape
    preset = {"enum": list(PRESETS), "description": "A shape by name; other keys override its fields."}
    model["properties"] = {"preset": preset} | model["properties"]
    schema["$defs"]["DataSource"] = {"anyOf": [{"type": "string"}, dict(source)]}
    for sources in (schema["$defs"]["DataConfig"]["properties"][name] for name in ("train", "valid")):
        sources["anyOf"] = [{"$ref": "#/$defs/DataSource"}, {"type": "array", "items": sources.pop("items")}]
        del sources["type"]
    rope = schema["$defs"]["RopeScaling"]
    rope["properties"]["type"] = rope["properties"]["rope_type"] | {"description": "Old name of rope_type."}
    rope["required"] = ["factor"]
    schema["required"] = ["run", "model", "data", "batch", "optim", "train"]
    return schema


# ---- defaults that depend on other sections ----


def _with_defaults(settings: Mapping[Any, Any]) -> dict[Any, Any]:
    """A section that is absent or empty takes its defaults, or has its own settings named as missing."""
    filled = {name: given for name, given in settings.items() if given is not None or name == "recompute"}
    filled = {name: {} for name in Config.model_fields if name not in ("model", "recompute")} | filled
    optim, train = filled["optim"], filled["train"]
    if isinstance(optim, dict) and optim.get("schedule") == "wsd" and optim.get("decay_steps") is None:
        steps = _whole(train.get("steps")) if isinstance(train, dict) else None
        if isinstance(steps, int):
            filled["optim"] = optim | {"decay_steps": max(1, steps // 10)}
    return filled


# ---- the model section ----


def _resolve_model(given: dict[Any, Any]) -> dict[Any, Any]:
    """The fields of ModelConfig: those of the preset or of the directory's config.json filled in."""
    preset, path = given.get("preset"), given.get("path")
    rest = {key: value for key, value in given.items() if key not in ("preset", "path")}
    if preset is not None and path is not None:
        raise InputError("model: preset and path exclude each other; keep one")
    if preset is not None:
        if not isinstance(preset, str) or preset not in PRESETS:
            raise InputError(
                f"model.preset: {_show(preset)} is not one of {', '.join(PRESETS)}{_nearest(preset, PRESETS)}"
            )
        return PRESETS[preset] | rest
    if isinstance(path, str):
        return _from_directory(path, rest)
    return rest if path is None else given


def _from_directory(path: str, rest: dict[Any, Any]) -> dict[str, Any]:
    """The fields in a Hugging Face directory's config.json; what the user gives beside must agree."""
    file = Path(path) / "config.json"
    fields = hugging_face_shape(file) | {"path": path}
    stored = _validate(ModelConfig, fields, ("model",), source=f" (in {file})")
    shape = stored.model_dump(mode="json")
    asked = _validate(ModelConfig, shape | rest, ("model",))
    for name in rest:
        if getattr(asked, name) != getattr(stored, name):
            raise InputError(
                f"model.{name}: {_show(rest[name])} is not what {file} says, {_show(shape[name])}; "
                f"with model.path, leave the shape out"
            )
    return shape


# ---- checks across sections ----


def _model_problems(config: Config) -> Iterator[str]:
    model, tensor = config.model, config.parallel.tensor
    heads, kv_heads = model.num_attention_heads, model.num_key_value_heads
    if model.hidden_size % heads:  # transformers refuses such a model, whatever its head_dim
        yield f"model.num_attention_heads: {heads} does not divide model.hidden_size {model.hidden_size}"
    if heads % kv_heads:
        yield f"model.num_key_value_heads: {kv_heads} does not divide model.num_attention_heads {heads}"
    if model.head_dim % 2:
        yield f"model.head_dim: {model.head_dim} is odd; rotary embeddings need an even one"
    if model.vocab_size is None and config.data.tokenizer is None:
        yield "model.vocab_size: missing; give it, or data.tokenizer to take it from"
    if config.data.sequence_length > model.max_position_embeddings:
        yield (
            f"data.sequence_length: {config.data.sequence_length} is above "
            f"model.max_position_embeddings {model.max_position_embeddings}"
        )
    if heads % tensor:
        yield f"parallel.tensor: {tensor} does not divide model.num_attention_heads {heads}"
    if kv_heads % tensor and tensor % kv_heads:
        yield (
            f"parallel.tensor: {tensor} neither divides model.num_key_value_heads {kv_heads} "
            f"nor is a multiple of it"
        )
    if model.intermediate_size % tensor:
        yield f"parallel.tensor: {tensor} does not divide model.intermediate_size {model.intermediate_size}"
    tokens = config.batch.micro * config.data.sequence_length
    if config.parallel.sequence and tokens % tensor:
        yield (
            f"parallel.sequence: parallel.tensor {tensor} does not divide the {tokens} tokens "
            f"of a microbatch (batch.micro x data.sequence_length)"
        )


def _stage_problems(config: Config) -> Iterator[str]:
    parallel, layers = config.parallel, config.model.num_hidden_layers
    stages = parallel.pipeline * parallel.chunks
    count = f"{parallel.pipeline} x parallel.chunks {parallel.chunks} = {stages} stages"
    interleaved = parallel.schedule == "interleaved"
    if parallel.chunks > 1 and not interleaved:
        yield (
            f"parallel.chunks: {parallel.chunks} needs parallel.schedule interleaved, not {parallel.schedule}"
        )
    if interleaved and (parallel.pipeline == 1 or parallel.chunks == 1):
        yield (
            f"parallel.schedule: interleaved needs parallel.pipeline and parallel.chunks of at least 2, "
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
    optim, steps, precision = config.optim, config.train.steps, config.precision
    if precision.gradients == "bf16" and precision.compute != "bf16":
        yield f"precision.gradients: bf16 needs precision.compute bf16, not {precision.compute}"
    scale = precision.loss_scale
    if scale != LossScaleConfig() and precision.compute != "fp16":
        yield f"precision.loss_scale: set, but needs precision.compute fp16, not {precision.compute}"
    elif scale.initial < scale.minimum:
        yield f"precision.loss_scale.initial: {scale.initial} is below precision.loss_scale.minimum {scale.minimum}"
    if config.zero.prefetch != 1 and config.zero.stage != 3:
        yield f"zero.prefetch: {config.zero.prefetch} needs zero.stage 3, not {config.zero.stage}"
    if config.zero.offload == "none" and config.zero.offload_fraction != 1.0:
        yield f"zero.offload_fraction: {config.zero.offload_fraction} needs zero.offload optimizer"
    if optim.min_lr > optim.lr:
        yield f"optim.min_lr: {optim.min_lr} is above optim.lr {optim.lr}"
    if optim.decay_steps is not None and optim.schedule != "wsd":
        yield f"optim.decay_steps: only with optim.schedule wsd, not {optim.schedule}; set it to null"
    elif optim.warmup_steps + (optim.decay_steps or 0) > steps:
        decay = f" + optim.decay_steps {optim.decay_steps}" if optim.decay_steps else ""
        yield f"optim.warmup_steps: {optim.warmup_steps}{decay} is above train.steps {steps}"
    if config.train.eval_every is not None and not config.data.valid:
        yield f"train.eval_every: {config.train.eval_every} needs data.valid, which is empty"


def _path_problems(config: Config) -> Iterator[str]:
    tokenizer, resume = config.data.tokenizer, config.checkpoint.resume
    if tokenizer is not None and not Path(tokenizer).exists():
        yield f"data.tokenizer: no file or directory {tokenizer!r}"
    if resume not in ("auto", "none") and not Path(resume).is_dir():
        hint = _nearest(resume, ["auto", "none"])
        yield f"checkpoint.resume: {resume!r} is neither auto, none nor a checkpoint's directory{hint}"


def _world_problems(config: Config, world_size: int) -> Iterator[str]:
    parallel, batch = config.parallel, config.batch
    ranks = parallel.tensor * parallel.pipeline
    if world_size < 1 or world_size % ranks:
        layout = f"tensor {parallel.tensor} x pipeline {parallel.pipeline} = {ranks}"
        yield f"world size {world_size} is not a multiple of {layout}"
        return
    data = config.data_parallel_size(world_size)
    if batch.global_size % (batch.micro * data):
        together = f"batch.micro {batch.micro} x data-parallel size {data} = {batch.micro * data}"
        yield f"batch.global: {batch.global_size} is not a multiple of {together}"
    elif parallel.schedule == "interleaved" and config.num_microbatches(world_size) % parallel.pipeline:
        yield (
            f"parallel.schedule: interleaved needs microbatches in multiples of parallel.pipeline "
            f"{parallel.pipeline}, not {config.num_microbatches(world_size)} "
            f"(batch.global / batch.micro / data-parallel size {data})"
        )


# ---- from pydantic's errors to a line for each setting ----


S = TypeVar("S", bound=Section)


def _validate(kind: type[S], settings: dict[Any, Any], path: tuple[str, ...] = (), source: str = "") -> S:
    try:
        # As JSON: there, and not from Python objects, strict lists become tuples and mappings sections.
        return kind.model_validate_json(json.dumps(settings, default=_show))
    except ValidationError as invalid:
        problems: dict[str, str] = {}
        for error in invalid.errors(include_url=False):
            if error["type"] != "default_factory_not_called":
                where, allowed = _locate((*path, *error["loc"]))
                problems.setdefault(where, f"{where}: {_describe(error, where, allowed)}{source}")
        # Of a union's complaints about one setting, keep those about its entries.
        outer = {where.partition("[")[0] for where in problems if "[" in where}
        raise InputError("\n".join(problems[where] for where in problems if where not in outer)) from None


def _locate(location: tuple[int | str, ...]) -> tuple[str, list[str]]:
    """The setting's path as the user writes it, and the names that its section has."""
    where, allowed = "", list[str]()
    section: type[Section] | None = Config
    for part in location:
        if isinstance(part, int):
            where += f"[{part}]"
        elif section is not None:
            fields = {field.alias or name: field for name, field in section.model_fields.items()}
            allowed = [*fields, "preset"] if section is ModelConfig else list(fields)
            where = f"{where}.{part}" if where else part
            section = _section_in(fields[part].annotation) if part in fields else None
        # else: pydantic names the member of a union here; the user does not
    return where, allowed


def _section_in(annotation: object) -> type[Section] | None:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next((found for found in map(_section_in, get_args(annotation)) if found), None)


# By pydantic's type of error; what its context holds goes in.
_SAYS = {
    "int_type": "is not a whole number",
    "int_from_float": "is not a whole number",
    "float_type": "is not a number",
    "finite_number": "is not a finite number",
    "bool_type": "is neither true nor false",
    "string_type": "is not text (a number that is meant as text needs quotes)",
    "string_too_short": "is empty",
    "tuple_type": "is not a list",
    "too_short": "has fewer entries than the {min_length} needed",
    "too_long": "has more entries than the {max_length} allowed",
    "model_type": "is not a section with settings of its own",
    "greater_than": "is not above {gt:g}",
    "greater_than_equal": "is below {ge:g}, the least allowed",
    "less_than": "is not below {lt:g}",
    "literal_error": "is not {expected}",
}


def _describe(error: Any, where: str, allowed: list[str]) -> str:
    kind, given = error["type"], error["input"]
    if kind == "missing":
        return "missing" + ("; give its preset, path or sizes" if where == "model" else "")
    if kind == "extra_forbidden":
        return _unknown(where, allowed)
    if kind == "value_error":
        return str(error["ctx"]["error"])
    said = _SAYS.get(kind, error["msg"]).format_map(error.get("ctx", {}))
    choices = re.findall("'([^']*)'", said) if kind == "literal_error" else []
    return f"{_show(given)} {said}{_nearest(given, choices)}"


def _unknown(where: str, allowed: list[str]) -> str:
    """The same name in another section, else the nearest in this one, else what there is."""
    section, _, name = where.rpartition(".")
    elsewhere = [path for path in _paths(Config) if path.rpartition(".")[2] == name]
    beside = [f"{section}.{sibling}" if section else sibling for sibling in get_close_matches(name, allowed)]
    guess = "".join(f"; did you mean {path}?" for path in (elsewhere or beside)[:1])
    names = f"; {section or 'a settings file'} has {', '.join(allowed)}"
    return f"unknown setting{guess or names}"


def _paths(kind: type[Section], prefix: str = "") -> Iterator[str]:
    for name, field in kind.model_fields.items():
        path = prefix + (field.alias or name)
        section = _section_in(field.annotation)
        if section is None:
            yield path
        elif section is not DataSource:  # its settings are entries of a list
            yield from _paths(section, f"{path}.")


def _nearest(given: object, names: Iterable[str]) -> str:
    close = get_close_matches(str(given), list(names), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _show(value: object) -> str:
    """A value as in YAML, on one line, not too long."""
    if isinstance(value, str):
        return repr(value)
    text = json.dumps(value, default=repr)
    return text if len(text) <= 80 else f"{text[:76]} ..."
