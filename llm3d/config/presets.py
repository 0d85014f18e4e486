"""Shapes of models: published LLaMAs and a few small ones by name, others from a Hugging Face config.json.

Names of the fields are those of `llm3d.config.sections.ModelConfig`; what a preset leaves out has that class's
default. The three small shapes have no vocabulary of their own: it comes from `data.tokenizer`, or from
`model.vocab_size`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llm3d.errors import InputError

Shape = dict[str, Any]

LLAMA_1: Shape = {
    "vocab_size": 32_000,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA_2: Shape = LLAMA_1 | {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
LLAMA_3: Shape = {
    "vocab_size": 128_256,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_theta": 500_000.0,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 128_000,
    "eos_token_id": 128_001,
}


def long_context(factor: float) -> Shape:
    """What Llama 3.1 and 3.2 add to Llama 3: 131,072 positions, the slow rotations stretched by `factor`."""
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    return LLAMA_3 | {"max_position_embeddings": 131_072, "rope_scaling": scaling}


def shape(hidden_size: int, intermediate_size: int, layers: int, heads: int) -> Shape:
    return {
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }


PRESETS: dict[str, Shape] = {
    # For tests and two CPU cores; the name gives the size with 2,000, 16,000 and 32,000 tokens.
    "llama-tiny": shape(128, 352, 4, 4) | {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "llama-20m": shape(384, 1024, 8, 8) | {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "llama-160m": shape(768, 3072, 12, 12),
    # Llama 3.2 1B
    "llama-1b": long_context(32.0) | shape(2048, 8192, 16, 32) | {"tie_word_embeddings": True},
    # LLaMA, Touvron et al., February 2023
    "llama-7b": LLAMA_1 | shape(4096, 11_008, 32, 32),
    "llama-13b": LLAMA_1 | shape(5120, 13_824, 40, 40),
    "llama-33b": LLAMA_1 | shape(6656, 17_920, 60, 52),
    "llama-65b": LLAMA_1 | shape(8192, 22_016, 80, 64),
    # Llama 2, Touvron et al., July 2023
    "llama-2-7b": LLAMA_2 | shape(4096, 11_008, 32, 32),
    "llama-2-13b": LLAMA_2 | shape(5120, 13_824, 40, 40),
    "llama-2-70b": LLAMA_2 | shape(8192, 28_672, 80, 64) | {"num_key_value_heads": 8},
    # The Llama 3 herd, Grattafiori et al., 2024
    "llama-3-8b": LLAMA_3 | shape(4096, 14_336, 32, 32),
    "llama-3-70b": LLAMA_3 | shape(8192, 28_672, 80, 64),
    "llama-3.1-8b": long_context(8.0) | shape(4096, 14_336, 32, 32),
    "llama-3.1-70b": long_context(8.0) | shape(8192, 28_672, 80, 64),
    "llama-3.1-405b": long_context(8.0) | shape(16_384, 53_248, 126, 128),
}

# What a config.json may say of a shape, and what transformers takes where it is silent.
_HUGGING_FACE_DEFAULTS: Shape = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "max_position_embeddings": 2048,
    "rope_theta": 10_000.0,
    "rope_scaling": None,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
# Fields of a config.json that ask for what is not built, and the value that does not.
_ONLY: Shape = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "quantization_config": None,
}


def hugging_face_directory(path: str) -> Path:
    """The directory itself, or the one in an llm3d checkpoint."""
    return _inside_checkpoint(Path(path), "model")


def adapter_directory(path: str) -> Path:
    """The PEFT directory itself, or the one in an llm3d checkpoint."""
    return _inside_checkpoint(Path(path), "adapter")


def _inside_checkpoint(path: Path, folder: str) -> Path:
    return path / folder if (path / "manifest.json").is_file() else path


def _read_json(setting: str, file: Path) -> Any:
    """A file that a setting leads to. Raises InputError."""
    try:
        return json.loads(file.read_bytes())
    except OSError as error:
        raise InputError(f"{setting}: {file}: {(error.strerror or 'cannot be read').lower()}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{setting}: {file} is not JSON: {error}") from None


# Fields of an adapter_config.json that ask for what is not built, and the values that do not.
_ONLY_LORA: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_dora": (False,),
    "fan_in_fan_out": (False,),
    "rank_pattern": ({},),
    "alpha_pattern": ({},),
    "layers_to_transform": (),
}

# What PEFT takes for the head of any classifier, and lists in modules_to_save.
_HEADS = {"score", "classifier"}


def peft_settings(path: str) -> dict[str, Any]:
    """The fields of LoRASettings in a PEFT directory's adapter_config.json. Raises InputError."""
    file = adapter_directory(path) / "adapter_config.json"
    stored = _read_json("lora.path", file)
    if not isinstance(stored, dict):
        raise InputError(f"lora.path: {file} holds no object, as adapter_config.json does")
    for name, supported in _ONLY_LORA.items():
        if stored.get(name) not in (*supported, None):
            raise InputError(f"lora.path: {file}: {name} {stored[name]!r} is not supported")
    whole = stored.get("modules_to_save") or []
    if not set(whole) <= _HEADS:
        raise InputError(f"lora.path: {file}: modules_to_save {whole!r} is not supported")
    names = {"rank": "r", "alpha": "lora_alpha", "rslora": "use_rslora", "targets": "target_modules"}
    found = {ours: stored[theirs] for ours, theirs in names.items() if stored.get(theirs) is not None}
    return found | {"path": path}


def hugging_face_shape(file: Path) -> Shape:
    """The fields in the config.json of a Hugging Face LLaMA, old (rope_scaling) or new (rope_parameters)."""
    if not file.parent.is_dir():
        adapters = (file.parent.parent / "adapter").is_dir()
        hint = (
            "; the adapters beside it have a base, with which `llm3d export` merges them" if adapters else ""
        )
        raise InputError(f"model.path: no directory {str(file.parent)!r}{hint}")
    stored = _read_json("model.path", file)
    if not isinstance(stored, dict) or stored.get("model_type") != "llama":
        kind = stored.get("model_type") if isinstance(stored, dict) else None
        raise InputError(f"model.path: {file} has model_type {kind!r}; only 'llama' is supported")
    for name, supported in _ONLY.items():
        if stored.get(name) not in (supported, None):
            raise InputError(f"model.path: {file}: {name} {stored[name]!r} is not supported")
    known = {name: stored.get(name, default) for name, default in _HUGGING_FACE_DEFAULTS.items()}
    known |= _rope_parameters(file, stored)
    if (known["pad_token_id"] or 0) < 0:
        known["pad_token_id"] = None  # as conversions of LLaMA 1 wrote it
    # Null asks for the default, except that a token may be absent.
    return {name: value for name, value in known.items() if value is not None or name.endswith("token_id")}


def _rope_parameters(file: Path, stored: dict[str, Any]) -> Shape:
    """transformers 5 keeps rope_theta and rope_scaling together as rope_parameters."""
    rope = stored.get("rope_parameters")
    if not isinstance(rope, dict):
        return {}
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise InputError(f"model.path: {file}: partial_rotary_factor is not supported")
    scaling = {key: rope[key] for key in rope if key not in ("rope_theta", "partial_rotary_factor")}
    theta = {"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {}
    return theta | {"rope_scaling": scaling if "rope_type" in scaling or "type" in scaling else None}
