"""What a checkpoint means: the settings with which its numbers were made, and without which they are others.

They are kept in the checkpoint, and compared where it is used again. Layout, batch, learning rate, data and the number
of steps are not among them: these may change while a run goes on.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from llm3d.config import STAGES, Config
from llm3d.config.explain import show
from llm3d.config.hugging_face import hugging_face_directory
from llm3d.config.peft import adapter_directory
from llm3d.errors import InputError

FILE = "meaning.json"
# Of the model, what is not computed with; all else is compared.
_NOT_COMPUTED = {
    *("path", "max_position_embeddings", "initializer_range"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
}
_HARMLESS = "precision.compute"  # weights pass between precisions
_SAMPLES, _SAMPLE_BYTES = 64, 4096


def meaning_of(config: Config) -> dict[str, Any]:
    """By setting; JSON. What a run starts from stands there with a digest of its weights."""
    model, lora = config.model, config.lora
    start = None if model.path is None else _start(hugging_face_directory(model.path))
    adapters = None if lora.path is None else _start(adapter_directory(lora.path))
    fields = {"model": model.model_dump(mode="json", exclude=_NOT_COMPUTED), "lora": {"rank": lora.rank}}
    if lora.rank:
        fields["lora"] = lora.model_dump(mode="json", include={"rank", "alpha", "rslora"})
        fields["lora"]["targets"] = sorted(lora.targets)
    return {
        "stage": next(name for name, kind in STAGES.items() if type(config) is kind),
        "model.path": start,
        "lora.path": adapters,
        **{f"{section}.{name}": value for section in fields for name, value in fields[section].items()},
        _HARMLESS: config.precision.compute,
    }


def check_meaning(checkpoint: Path, config: Config, goes_on: dict[str, Any] | None) -> list[str]:
    """Compare what a checkpoint means with the settings; -> differences that do no harm, for people.

    goes_on: the meaning of what is trained on from it; None: only the model is used, of whatever stage. Raises
    InputError for the first difference that does harm. A checkpoint that does not say what it means passes.
    """
    stored = _read(checkpoint / FILE)
    now = goes_on or meaning_of(config)
    ignored = set() if goes_on else {"stage", "lora.path", *({"model.path"} if not config.lora.rank else ())}
    if goes_on and stored.get("stage", now["stage"]) != now["stage"]:
        raise InputError(
            f"{checkpoint}: of {stored['stage']}, and cannot go on as {now['stage']}; name another run.dir, and "
            f"model.path={checkpoint} to start from its weights"
        )
    differing = [name for name in stored if name not in ignored and _differ(stored[name], now.get(name))]
    for name in differing:
        if name != _HARMLESS:
            raise InputError(
                f"{name}: {_shown(now.get(name))} is not what {checkpoint} was trained with, "
                f"{_shown(stored[name])}; set it as it was, or {_remedy(config)}"
            )
    return [f"{name}: {now[name]}, where {checkpoint} was trained with {stored[name]}" for name in differing]


def _remedy(config: Config) -> str:
    if config.checkpoint.resume == "auto":
        return "name another run.dir"
    return "name another checkpoint.resume"


def _start(directory: Path) -> dict[str, str]:
    return {"path": str(directory.resolve()), "digest": digest_of_weights(directory)}


def digest_of_weights(directory: Path) -> str:
    """16 hex digits that change when the weights in a directory do: of sizes, and of samples all over the files."""
    hasher = hashlib.sha256()
    try:
        for path in sorted(directory.glob("*.safetensors")):
            size = path.stat().st_size
            hasher.update(f"{path.name} {size} ".encode())
            with path.open("rb") as file:
                for i in range(_SAMPLES):
                    file.seek(max(0, size - _SAMPLE_BYTES) * i // (_SAMPLES - 1))
                    hasher.update(file.read(_SAMPLE_BYTES))
    except OSError as error:
        raise InputError(f"{error.filename}: {error.strerror}") from None
    return hasher.hexdigest()[:16]


def _differ(stored: Any, now: Any) -> bool:
    """Of what a run starts from, the weights count, wherever they lie."""
    if isinstance(stored, dict) and "digest" in stored and isinstance(now, dict):
        return bool(stored["digest"] != now["digest"])
    return bool(stored != now)


def _shown(value: Any) -> str:
    if isinstance(value, dict) and "digest" in value:
        return f"{value['path']} (weights {value['digest']})"
    return show(value)


def _read(file: Path) -> dict[str, Any]:
    """Empty where there is none, as in checkpoints of earlier versions."""
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}") from None
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise InputError(f"{file}: damaged; remove this checkpoint and start again, from the one before it")
    return content
