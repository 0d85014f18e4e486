"""A Hugging Face directory's config.json as the fields of `llm3d.config.sections.ModelConfig`.

Whatever transformers writes of a family in `llm3d.config.families.ARCHITECTURES`, and computes as llm3d does, is read.
Of other fields only those pass that are known to change nothing of what the model computes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llm3d.config.explain import show
from llm3d.config.families import ARCHITECTURES
from llm3d.errors import InputError

Shape = dict[str, Any]

_THETA = 10_000.0

# Fields that change nothing of what the model computes, whatever they say: notes of who wrote the file, what outputs
# look like, how memory is used, and settings of text generation, which transformers 4 wrote here.
_HARMLESS = """
    model_type architectures _name_or_path name_or_path transformers_version _commit_hash tokenizer_class prefix
    torch_dtype dtype use_bfloat16 is_llama_config transformers.js_config unsloth_version unsloth_fixed
    max_sequence_length model_max_length tokenizer_model_max_length
    use_cache cache_implementation pretraining_tp chunk_size_feed_forward gradient_checkpointing torchscript
    attn_implementation _attn_implementation _attn_implementation_autoset _attn_implementation_internal
    _flash_attn_2_enabled output_attentions output_hidden_states return_dict tf_legacy_loss is_decoder
    id2label label2id num_labels problem_type finetuning_task task_specific_params
    sep_token_id cls_token_id decoder_start_token_id
    max_length min_length max_new_tokens do_sample early_stopping num_beams num_beam_groups diversity_penalty
    temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores return_dict_in_generate
    forced_bos_token_id forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens
    begin_suppress_tokens
"""
_ROPE = ("rope_theta", "rope_scaling", "rope_parameters")
# What each kind of scaling depends on; what it is given beside is not read by transformers.
_SCALINGS: dict[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
_UNREAD = frozenset(
    {"rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"}
)


def hugging_face_directory(path: str) -> Path:
    """The directory itself, or the one in an llm3d checkpoint."""
    return inside_checkpoint(Path(path), "model")


def inside_checkpoint(path: Path, folder: str) -> Path:
    return path / folder if (path / "manifest.json").is_file() else path


def generation_settings(path: str | None) -> dict[str, Any]:
    """What the generation_config.json of the model at a path says; nothing where there is none. Raises InputError."""
    file = hugging_face_directory(path) / "generation_config.json" if path else None
    return read_object("model.path", file) if file is not None and file.is_file() else {}


def token_ids(*values: Any) -> list[int]:
    """The tokens that settings name, each once: a value is an id, several or None."""
    several = (value if isinstance(value, list | tuple) else (value,) for value in values)
    return list(dict.fromkeys(index for ids in several for index in ids if index is not None))


def read_object(setting: str, file: Path) -> dict[str, Any]:
    """The JSON object in a file that a setting leads to. Raises InputError."""
    try:
        stored = json.loads(file.read_bytes())
    except OSError as error:
        raise InputError(f"{setting}: {file}: {(error.strerror or 'cannot be read').lower()}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{setting}: {file} is not JSON: {error}") from None
    if not isinstance(stored, dict):
        raise InputError(f"{setting}: {file} does not hold a JSON object")
    return stored


def check_fields(
    where: str, stored: dict[str, Any], only: dict[str, tuple[Any, ...]], harmless: set[str]
) -> None:
    """Raise InputError for a field that may change what a model computes and is not built.

    only: fields with the values that are, of a list each entry.  harmless: further fields that may have any value.
    Null, false, 0 and what is empty ask for nothing.
    """
    for name, value in stored.items():
        if name in only:
            entries = value if isinstance(value, list) else [value]
            if value is not None and any(entry not in only[name] for entry in entries):
                raise InputError(f"{where}: {name} {show(value)} is not supported")
        elif value and name not in harmless:
            raise InputError(
                f"{where}: {name} {show(value)} is not known here, and may change what the model computes; "
                "remove it from the file if it does not"
            )


def hugging_face_shape(file: Path) -> Shape:
    """The fields in the config.json of a Hugging Face model, as any transformers wrote it. Raises InputError."""
    if not file.parent.is_dir():
        adapters = (file.parent.parent / "adapter").is_dir()
        hint = (
            "; the adapters beside it have a base, with which `llm3d export` merges them" if adapters else ""
        )
        raise InputError(f"model.path: no directory {str(file.parent)!r}{hint}")
    stored, where = read_object("model.path", file), f"model.path: {file}"
    family = ARCHITECTURES.get(str(stored.get("model_type")))
    if family is None:
        supported = ", ".join(map(repr, ARCHITECTURES))
        raise InputError(f"{where} has model_type {stored.get('model_type')!r}; supported are {supported}")
    check_fields(where, stored, family.only, {*_HARMLESS.split(), *family.harmless, *family.defaults, *_ROPE})
    known = {name: stored.get(name, default) for name, default in family.defaults.items()}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if isinstance(value := known[name], int) and value < 0:
            known[name] = None  # as conversions of LLaMA 1 wrote it
    known |= _rope(where, stored, known["max_position_embeddings"])
    # Null asks for the default, except that a token may be absent.
    return {name: value for name, value in known.items() if value is not None or name.endswith("token_id")}


def _rope(where: str, stored: dict[str, Any], positions: Any) -> Shape:
    """rope_theta and rope_scaling, which transformers 4 keeps apart and transformers 5 together as rope_parameters."""
    given = {name: stored[name] for name in ("rope_scaling", "rope_parameters") if stored.get(name)}
    for name, rope in given.items():
        if not isinstance(rope, dict):
            raise InputError(f"{where}: {name} {show(rope)} is not an object")
    thetas = {name: rope["rope_theta"] for name, rope in given.items() if rope.get("rope_theta") is not None}
    if stored.get("rope_theta") is not None:
        thetas["rope_theta"] = stored["rope_theta"]
    scalings = {name: _scaling(f"{where}: {name}", rope, positions) for name, rope in given.items()}
    return {
        "rope_theta": _agreed(where, thetas, _THETA),
        "rope_scaling": _agreed(where, scalings, None),
    }


def _agreed(where: str, values_by_place: dict[str, Any], default: Any) -> Any:
    """What all places say that say something."""
    values = list(values_by_place.values())
    if any(value != values[0] for value in values):
        places = ", ".join(f"{name} {show(value)}" for name, value in values_by_place.items())
        raise InputError(f"{where}: contradicts itself: {places}; remove the wrong one")
    return values[0] if values else default


def _scaling(where: str, rope: dict[str, Any], positions: Any) -> Shape | None:
    """The fields of `llm3d.config.sections.RopeScaling`; None for none."""
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if rope.get("type") not in (kind, None):
        raise InputError(f"{where}: contradicts itself: rope_type {show(kind)}, type {show(rope['type'])}")
    if rope.get("partial_rotary_factor") not in (1, None):
        raise InputError(
            f"{where}: partial_rotary_factor {show(rope['partial_rotary_factor'])} is not supported"
        )
    if kind == "default":
        return None
    if kind not in _SCALINGS:
        supported = ", ".join(("default", *_SCALINGS))
        raise InputError(f"{where}: rope_type {show(kind)} is not supported; supported are {supported}")
    for name, value in rope.items():
        if value and name not in _UNREAD.union(_SCALINGS[kind]):
            raise InputError(f"{where}: {name} {show(value)} is not supported with rope_type {kind}")
    defaults = {"original_max_position_embeddings": positions}
    fields = {name: rope.get(name) or defaults.get(name) for name in _SCALINGS[kind]}
    return {"rope_type": kind} | {name: value for name, value in fields.items() if value is not None}
