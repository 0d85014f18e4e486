"""A PEFT directory's adapter_config.json as the fields of `llm3d.config.sections.LoRASettings`.

Which projections have adapters is told by the tensors, however the file spells it: by names, whole names of modules,
"all-linear" or a pattern.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from llm3d.config.explain import show
from llm3d.config.hugging_face import check_fields, inside_checkpoint, read_object
from llm3d.errors import InputError

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."  # of PEFT's names

# Fields that ask for what is not built, and the values that do not. Other first values than these are subtracted from
# the base when PEFT loads them.
_ONLY: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM", "SEQ_CLS"),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}
# Fields that are read, or told by the tensors, or change nothing of what adapters compute, whatever they say.
_HARMLESS = """
    r lora_alpha use_rslora rank_pattern alpha_pattern modules_to_save
    target_modules exclude_modules layers_to_transform layers_pattern
    auto_mapping peft_version base_model_name_or_path revision inference_mode lora_dropout fan_in_fan_out
    megatron_core qalora_group_size eva_config runtime_config ensure_weight_tying
"""
# What PEFT takes for the head of any classifier, and lists in modules_to_save.
_HEADS = {"score", "classifier"}
_MODULE = re.compile(
    re.escape(PREFIX) + r"(model\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+))\.lora_[AB]\.weight"
)


def adapter_directory(path: str) -> Path:
    """The PEFT directory itself, or the one in an llm3d checkpoint."""
    return inside_checkpoint(Path(path), "adapter")


def peft_settings(path: str) -> dict[str, Any]:
    """The fields of LoRASettings in a PEFT directory. Raises InputError where its adapters are not llm3d's kind."""
    directory = adapter_directory(path)
    file = directory / "adapter_config.json"
    stored, where = read_object("lora.path", file), f"lora.path: {file}"
    check_fields(where, stored, _ONLY, {*_HARMLESS.split()})
    whole = stored.get("modules_to_save") or []
    if not set(whole) <= _HEADS:
        raise InputError(f"{where}: modules_to_save {show(whole)} is not supported")
    modules = _modules(directory / WEIGHTS)
    try:
        _check_used(where, stored, modules)
        fields = {  # PEFT's defaults, where the file is silent
            "rank": _of_all(where, "rank_pattern", stored, stored.get("r", 8), modules),
            "alpha": _of_all(where, "alpha_pattern", stored, stored.get("lora_alpha", 8), modules),
        }
    except (re.error, TypeError) as error:
        raise InputError(f"{where}: a pattern or a list in it cannot be read ({error})") from None
    rslora = bool(stored.get("use_rslora"))
    return fields | {"rslora": rslora, "targets": _targets(directory / WEIGHTS, modules), "path": path}


def _modules(file: Path) -> dict[str, tuple[int, str]]:
    """The modules that have adapters, by name: of which layer, and which projection."""
    try:
        with safe_open(file, framework="numpy") as opened:
            names = [_MODULE.fullmatch(key) for key in opened.keys()]  # noqa: SIM118, the file is no mapping
    except OSError as error:
        pickled = (file.parent / "adapter_model.bin").is_file()
        hint = "; of a pickled adapter_model.bin, let PEFT write safetensors" if pickled else ""
        missing = "missing" if isinstance(error, FileNotFoundError) else error.strerror or str(error)
        raise InputError(f"lora.path: {file}: {missing}{hint}") from None
    except SafetensorError as error:
        raise InputError(f"lora.path: {file}: damaged ({error})") from None
    return {name[1]: (int(name[2]), name[3]) for name in names if name}


def _targets(file: Path, modules: dict[str, tuple[int, str]]) -> list[str]:
    """The projections that have adapters, the same ones in every layer."""
    layers: dict[int, set[str]] = {}
    for layer, projection in modules.values():
        layers.setdefault(layer, set()).add(projection)
    if not layers:
        raise InputError(f"lora.path: {file}: holds no adapters of projections that are known here")
    first = layers[min(layers)]
    for layer, targets in sorted(layers.items()):
        if targets != first:
            raise InputError(
                f"lora.path: {file}: layer {layer} has adapters of {', '.join(sorted(targets))}, layer {min(layers)} "
                f"of {', '.join(sorted(first))}; only the same in every layer are supported"
            )
    return sorted(first)


def _check_used(where: str, stored: dict[str, Any], modules: dict[str, tuple[int, str]]) -> None:
    """Raise InputError where PEFT would leave adapters of the file out."""
    targets, excluded, layers = (
        stored.get(name) for name in ("target_modules", "exclude_modules", "layers_to_transform")
    )
    for module, (layer, _) in modules.items():
        for name, used in (
            ("target_modules", not targets or _fits(targets, module)),
            ("exclude_modules", not excluded or not _fits(excluded, module)),
            (
                "layers_to_transform",
                layers is None or layer in ([layers] if isinstance(layers, int) else layers),
            ),
        ):
            if not used:
                raise InputError(
                    f"{where}: {name} {show(stored[name])} leaves out {module}, of which {WEIGHTS} has adapters"
                )


def _fits(names: Any, module: str) -> bool:
    """As PEFT finds modules: by a pattern, or by their names or the ends of these."""
    if isinstance(names, str):
        return names == "all-linear" or re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _of_all(where: str, name: str, stored: dict[str, Any], default: Any, modules: Collection[str]) -> Any:
    """The value that PEFT gives to all modules: that of the first pattern that fits a module's name, or the default."""
    patterns = stored.get(name) or {}
    values = [
        next((patterns[key] for key in patterns if re.match(rf"(.*\.)?({key})$", module)), default)
        for module in modules
    ]
    if any(value != values[0] for value in values):
        raise InputError(
            f"{where}: {name} {show(patterns)} is not supported; only the same for all modules is"
        )
    return values[0]
