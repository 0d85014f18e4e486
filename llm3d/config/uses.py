"""The settings of commands that use a model, from whatever names it: settings, a run, a checkpoint or the model alone.

What is used, the first of these that there is:
1. checkpoint.resume on the command line: a checkpoint, or `none` for the model that the settings name;
2. the checkpoint that was named, or the latest in the run directory that was named;
3. the latest checkpoint in run.dir of the settings, unless their checkpoint.resume says otherwise;
4. model.path.

A checkpoint knows its model, its tokenizer and its chat template; what the settings say of these then counts only where
it stands on the command line, which is refused where it does not agree with the checkpoint; so is a settings file whose
model has other sizes than what its run.dir holds. All else is said by the settings: for a run directory and a
checkpoint, its run's config.yaml.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from llm3d.config import (
    STAGES,
    Config,
    DPOConfig,
    PPOConfig,
    ZeroConfig,
    check_generation,
    check_layout,
    check_plan,
    parse_config,
)
from llm3d.config.explain import show
from llm3d.config.places import is_checkpoint, latest_checkpoint, place_of
from llm3d.config.presets import PRESETS
from llm3d.config.settings_file import read_settings
from llm3d.errors import InputError

C = TypeVar("C", bound=Config)
Settings = dict[Any, Any]

# What a generation_config.json says of sampling, under the same names.
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens")
_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
_TOKENIZERS = ("tokenizer.json", "tokenizer.model")


class Use(NamedTuple):
    """The settings, and what is to be said of how they were found."""

    config: Config
    remarks: list[str]


def config_for_generation(
    path: Path, overrides: Sequence[str], world_size: int, stage: str | None = None
) -> Use:
    """To write text: with all that only training needs made to fit. Raises InputError."""
    named = Named(path, overrides, stage, world_size)
    named.check_there_are_weights()
    named.take_model()
    named.fit_layout()
    as_given = parse_config(named.settings, named.kind)
    config = generation_layout(as_given)
    named.check_is_kept(as_given, config)
    check_generation(config, world_size)
    return Use(config, named.remarks)


def config_for_evaluation(
    path: Path, overrides: Sequence[str], world_size: int, stage: str | None = None
) -> Use:
    """For a stage's numbers on data.valid. Raises InputError."""
    named = Named(path, overrides, stage, world_size)
    if named.place.settings is None:
        raise InputError(
            f"{path}: is a model, which does not name data; give the CONFIG.yaml of a stage, with model.path={path}"
        )
    named.check_there_are_weights()
    if named.kind not in (DPOConfig, PPOConfig):
        named.take_model()
    elif named.weights is not None:  # they compare with the model that training started from
        named.take_start_of_run()
    named.fit_layout()
    config = parse_config(named.settings, named.kind)
    check_layout(config, world_size)
    return Use(config, named.remarks)


def config_for_plan(path: Path, overrides: Sequence[str], world_size: int, stage: str | None = None) -> Use:
    """To plan a run, for which shapes suffice: no weights, no tokenizer, no data. Raises InputError."""
    named = Named(path, overrides, stage, world_size)
    if named.place.settings is None:
        named.take_model()
    named.forget_missing_model()
    config = parse_config(named.settings, named.kind)
    if config.model.vocab_size is not None:
        config = config.model_copy(update={"data": config.data.model_copy(update={"tokenizer": None})})
    check_plan(config, world_size)
    return Use(config, named.remarks)


def generation_layout(config: C) -> C:
    """The settings as text is written: one stage a rank, whole rows, weights that stay."""
    parallel = config.parallel
    layers = None if parallel.chunks > 1 else parallel.layers_per_stage
    plain = {"chunks": 1, "schedule": "1f1b", "sequence": False, "layers_per_stage": layers}
    update = {"parallel": parallel.model_copy(update=plain), "zero": ZeroConfig(stage=0), "recompute": "none"}
    return config.model_copy(update=update)


def settings_at(path: Path) -> tuple[Path, list[str]]:
    """The settings file that a path names, a run's own where it is a directory; and the override that goes with it."""
    place = place_of(path)
    if place.settings is None:
        raise InputError(f"{path}: has no config.yaml; give the CONFIG.yaml of a stage")
    return place.settings, [] if place.run_dir is None else [f"run.dir={json.dumps(str(place.run_dir))}"]


def checkpoint_at(path: Path) -> Path:
    """The checkpoint or PEFT directory that a path names: a run's latest, or itself. Raises InputError."""
    place = place_of(path)
    if place.model is not None and not (place.model / "adapter_config.json").is_file():
        raise InputError(f"{path}: is a plain Hugging Face directory already; name a checkpoint or adapters")
    run_dir = place.run_dir
    if place.settings is not None and run_dir is None:
        run = read_settings(place.settings).get("run")
        run_dir = Path(str(run.get("dir"))) if isinstance(run, dict) else None
    checkpoint = place.checkpoint or place.model or (run_dir and latest_checkpoint(run_dir))
    if checkpoint is None:
        raise InputError(f"{path}: run directory {run_dir} has no complete checkpoint; train first")
    return checkpoint


class Named:
    """What a command was given, read: settings that are then made to fit what they are used for.

    kind: of the stage that was named, or whose section the settings have.
    weights: the checkpoint that is used, or the directory of a model alone; None: the settings name a model.
    """

    def __init__(self, path: Path, overrides: Sequence[str], stage: str | None, world_size: int) -> None:
        self.path, self.world_size = path, world_size
        self.place, self.remarks = place_of(path), list[str]()
        self.override_names = {override.partition("=")[0] for override in overrides}
        given: Path | Settings | None = self.place.settings
        if given is None:
            given = self._settings_of_model(self.place.model or self.place.checkpoint or path, stage)
        self.settings = read_settings(given, overrides)
        if self.place.run_dir is not None and not self.is_asked("run.dir"):
            self.section("run")["dir"] = str(self.place.run_dir)
        section = next((name for name in self.settings if name in STAGES), None)
        self.kind = STAGES[stage or section or "pretrain"]
        self.weights = self._weights()

    def is_asked(self, setting: str) -> bool:
        """Whether it stands on the command line, itself, in part or with its section."""
        return any(
            setting == name or setting.startswith(f"{name}.") or name.startswith(f"{setting}.")
            for name in self.override_names
        )

    def section(self, name: str) -> Settings:
        """A section to change; what is there but no section is refused where settings are."""
        if self.settings.get(name) is None:
            self.settings[name] = {}
        section = self.settings[name]
        return section if isinstance(section, dict) else {}

    def _weights(self) -> Path | None:
        resume, run_dir = self.section("checkpoint").get("resume", "auto"), self.section("run").get("dir")
        if self.is_asked("checkpoint.resume") or self.place.checkpoint is None:
            if self.place.model is not None and resume in ("auto", "none"):
                return self.place.model
            if resume == "auto":
                return latest_checkpoint(Path(run_dir)) if isinstance(run_dir, str) else None
            return Path(resume) if isinstance(resume, str) and is_checkpoint(Path(resume)) else None
        return self.place.checkpoint

    def check_there_are_weights(self) -> None:
        starts = self.section("checkpoint").get("resume") == "none"
        if self.place.run_dir is not None and self.weights is None and not starts:
            raise InputError(
                f"{self.path}: is a run directory without a complete checkpoint; train first, or use the model that "
                "training starts from with checkpoint.resume=none"
            )

    def take_model(self) -> None:
        """The model of the weights, whole or as adapters for a base, and the tokenizer and template beside it."""
        data = self.section("data")
        if self.weights is None:
            path = self.section("model").get("path")
            if isinstance(path, str) and data.get("tokenizer") is None:
                data["tokenizer"] = _tokenizer_in(_weights_in(Path(path)))
            return
        self._check_sizes()
        folder = _weights_in(self.weights)
        model, lora = self._overrides_of("model"), self._overrides_of("lora")
        if (folder / "adapter_config.json").is_file():
            self._check_names_the_weights("lora.path", lora)
            if "lora" in self.override_names and not lora:
                raise InputError(f"lora: null, but {self.weights} holds adapters and no whole model")
            self.settings |= {
                "model": model | {"path": self._base(folder)},
                "lora": lora | {"path": str(self.weights)},
            }
        else:
            self._check_names_the_weights("model.path", model)
            for name in (name for name in lora if lora[name]):
                raise InputError(
                    f"lora.{name}: {show(lora[name])}, but {self.weights} holds a whole model and no adapters"
                )
            self.settings |= {"model": model | {"path": str(self.weights)}, "lora": lora}
        self.section("checkpoint")["resume"] = "none"
        if not self.is_asked("data.tokenizer"):
            before = data.get("tokenizer")
            there = before if isinstance(before, str) and Path(before).exists() else None
            data["tokenizer"] = _tokenizer_in(folder) or there
        if has_template(folder) and "template" in data and not self.is_asked("data.template"):
            data["template"] = "auto"

    def _check_sizes(self) -> None:
        """Raise InputError where a settings file describes another model than its run directory holds."""
        if self.place.run_dir is not None or self.is_asked("checkpoint.resume"):
            return
        assert self.weights is not None
        stored, model = _read_json(self.weights / "meaning.json"), self.section("model")
        for name, value in (PRESETS.get(str(model.get("preset")), {}) | model).items():
            trained = stored.get(f"model.{name}")
            sizes = all(isinstance(size, int | float) for size in (value, trained))
            if sizes and value != trained and not self.is_asked(f"model.{name}"):
                raise InputError(
                    f"model.{name}: {show(value)} is not what {self.weights} was trained with, {show(trained)}; set "
                    "it as it was, or name another run.dir"
                )

    def _overrides_of(self, section: str) -> Settings:
        """What the command line says in a section; that it agrees with the weights' own files is checked with these."""
        given = self.section(section)
        overrides = {name: given[name] for name in given if self.is_asked(f"{section}.{name}")}
        if section == "model" and isinstance(overrides.get("preset"), str) and overrides["preset"] in PRESETS:
            overrides = PRESETS[overrides.pop("preset")] | overrides
        if section == "model" and overrides.get("vocab_size", 0) is None:
            del overrides["vocab_size"]  # the tokenizer tells it
        return overrides

    def _check_names_the_weights(self, setting: str, overrides: Settings) -> None:
        """Raise InputError where the command line names neither the weights that are used nor their run's start."""
        section, _, name = setting.partition(".")
        if name not in overrides:
            return
        used, given = self.weights, overrides[name]
        assert used is not None
        known = [used, _weights_in(used), (self._of_run().get(section) or {}).get(name)]
        if given is None or Path(str(given)).resolve() not in [
            Path(path).resolve() for path in known if path
        ]:
            raise InputError(
                f"{setting}: {show(given)} is not what is used, {used}; leave it out, or let checkpoint.resume=none "
                "take what the settings name"
            )

    def _of_run(self) -> Settings:
        """What the config.yaml of the run that the weights are of says, where it is there."""
        settings = place_of(self.weights).settings if self.weights is not None else None
        return read_settings(settings) if settings is not None else {}

    def _base(self, adapter: Path) -> str:
        """The directory of the model that adapters are for: as the command line, the adapters or the settings say."""
        of_settings = self.section("model").get("path")
        if self.is_asked("model.path") and isinstance(of_settings, str):
            return of_settings
        own = _read_json(adapter / "adapter_config.json").get("base_model_name_or_path")
        for base in (own, of_settings):
            if isinstance(base, str) and Path(base).is_dir():
                return base
        raise InputError(
            f"model.path: {own!r}, which the adapters in {adapter} are for, is no directory here; "
            "give the model that they are for"
        )

    def take_start_of_run(self) -> None:
        """The model and the adapters that a run's own config.yaml names, where it is there; and its checkpoint."""
        self._check_sizes()
        of_run = self._of_run()
        self.settings |= {
            name: of_run[name] for name in ("model", "lora") if name in of_run and not self.is_asked(name)
        }
        self.section("checkpoint")["resume"] = str(self.weights)

    def fit_layout(self) -> None:
        """This launch's number of ranks decides; what the command line says of the layout stays."""
        parallel = self.section("parallel")
        tensor, pipeline = (parallel.get(name, 1) for name in ("tensor", "pipeline"))
        ranks = tensor * pipeline if isinstance(tensor, int) and isinstance(pipeline, int) else 0
        kept = {name: parallel[name] for name in parallel if self.is_asked(f"parallel.{name}")}
        if ranks < 1 or self.world_size % ranks == 0 or kept == parallel:
            return
        self.settings["parallel"] = kept
        for name in ("rollout_tensor", "rollout_pipeline"):
            if "ppo" in self.settings and not self.is_asked(f"ppo.{name}"):
                self.section("ppo").pop(name, None)
        now = " x ".join(f"{name} {kept.get(name, 1)}" for name in ("tensor", "pipeline"))
        self.remarks.append(
            f"{now}: tensor {tensor} x pipeline {pipeline} needs {ranks} processes, here is {self.world_size}"
        )

    def check_is_kept(self, given: Config, used: Config) -> None:
        """Raise InputError where the command line asks for what is not used."""
        for name in sorted(self.override_names):
            requested, kept = _value_of(given, name), _value_of(used, name)
            if requested != kept:
                raise InputError(
                    f"{name}: {show(requested)} is for training; text is generated with {show(kept)}; leave it out"
                )

    def forget_missing_model(self) -> None:
        """Where model.path is not there, or no longer, its shape suffices, which a run's own settings have."""
        model = self.section("model")
        path = model.get("path")
        if isinstance(path, str) and not Path(path).exists() and not self.is_asked("model.path"):
            if "hidden_size" in model:
                del model["path"]
            elif self.weights is not None and (self.weights / "model").is_dir():
                model["path"] = str(self.weights)
        self.section("checkpoint")["resume"] = "none"

    def _settings_of_model(self, at: Path, stage: str | None) -> Settings:
        """Settings for a model alone, but for itself: to write as its own files say, and to plan fine-tuning it."""
        folder = _weights_in(at)
        config = _read_json(folder / "config.json")
        stored = _read_json(folder / "generation_config.json")
        sampling = {name: stored[name] for name in _SAMPLING if stored.get(name) is not None}
        if sampling:
            summary = ", ".join(f"{name} {value}" for name, value in sampling.items())
            self.remarks.append(f"as generation_config.json says: {summary}")
        length = config.get("max_position_embeddings")
        dtype = str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.")
        settings: Settings = {
            "run": {"dir": "."},
            "model": {},
            "precision": {"compute": _DTYPES.get(dtype, "fp32")},
            "data": {
                "train": [str(at)],
                "sequence_length": min(2048, length if isinstance(length, int) else 2048),
            },
            "batch": {"global": 2 * self.world_size, "micro": 2},
            "optim": {"lr": 1e-5},
            "train": {"steps": 1},
            "generate": sampling,
        }
        return settings | ({"sft": {}} if stage is None and has_template(folder) else {})


def _value_of(config: Config, setting: str) -> Any:
    """As YAML would give it; None where there is none."""
    value: Any = config.model_dump(mode="json", by_alias=True)
    for part in setting.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _weights_in(path: Path) -> Path:
    """The Hugging Face or PEFT directory itself, or the one in a checkpoint."""
    if not is_checkpoint(path):
        return path
    return path / ("adapter" if (path / "adapter").is_dir() else "model")


def _tokenizer_in(folder: Path) -> str | None:
    return str(folder) if any((folder / name).is_file() for name in _TOKENIZERS) else None


def has_template(folder: Path) -> bool:
    """Whether a chat template lies with the tokenizer in a directory."""
    own = _read_json(folder / "tokenizer_config.json").get("chat_template")
    return own is not None or (folder / "chat_template.jinja").is_file()


def _read_json(file: Path) -> dict[str, Any]:
    """An object's fields; none where there is no such file, or it is damaged, which is said where it is used."""
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
