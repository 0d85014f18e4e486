"""The schema that an editor checks a settings file with takes what a run takes, of any stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import ConfigDict, TypeAdapter, ValidationError

from llm3d.config import STAGES, json_schema, kind_of, parse_config
from llm3d.config.base import OneOrMore
from llm3d.config.settings_file import read_settings

FILES = sorted((Path(__file__).parent.parent.parent / "configs").rglob("*.yaml"))
TYPES: dict[str, Any] = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "null": type(None),
    "integer": int,
    "number": (int, float),
}
ANY_STAGE = json_schema()


def fits(value: Any, schema: dict[str, Any], root: dict[str, Any]) -> bool:
    """As JSON Schema has it, of the words that pydantic writes."""
    if "$ref" in schema:
        target: Any = root
        for part in schema["$ref"].removeprefix("#/").split("/"):
            target = target[part]
        return fits(value, target, root)
    if "if" in schema and not fits(
        value, schema["then" if fits(value, schema["if"], root) else "else"], root
    ):
        return False
    if "anyOf" in schema and not any(fits(value, one, root) for one in schema["anyOf"]):
        return False
    kinds = schema.get("type", list(TYPES))
    if not any(isinstance(value, TYPES[kind]) for kind in ([kinds] if isinstance(kinds, str) else kinds)):
        return False
    if isinstance(value, str) and len(value) < schema.get("minLength", 0):
        return False
    if value not in schema.get("enum", [value]) or value != schema.get("const", value):
        return False
    if isinstance(value, list):
        if len(value) < schema.get("minItems", 0):
            return False
        return all(fits(item, schema.get("items", {}), root) for item in value)
    if not isinstance(value, dict):
        return True
    known, others = schema.get("properties", {}), schema.get("additionalProperties", {})
    inside = [fits(part, known.get(name, others or {}), root) for name, part in value.items()]
    return (
        set(schema.get("required", ())) <= set(value)
        and (others is not False or value.keys() <= known.keys())
        and all(inside)
    )


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_settings_file_fits_and_none_that_is_misspelled(path: Path) -> None:
    settings = read_settings(path)
    of_stage = json_schema(kind_of(path))
    for schema in (ANY_STAGE, of_stage):
        assert fits(settings, schema, schema)
        assert not fits(settings | {"optimm": {}}, schema, schema)
        assert not fits(settings | {"train": settings["train"] | {"stepps": 3}}, schema, schema)
    assert not fits({name: settings[name] for name in settings if name != "model"}, ANY_STAGE, ANY_STAGE)


LISTS = [
    (stage, name, setting)
    for stage, kind in STAGES.items()
    for name, section in kind.model_fields.items()
    if section.annotation is not None and hasattr(section.annotation, "model_fields")
    for setting, field in section.annotation.model_fields.items()
    if any(isinstance(mark, OneOrMore) for mark in field.metadata)
]
ENTRIES: list[Any] = [
    "x",
    "",
    0.5,
    {"path": "x"},
    {"path": "x", "weight": 2.0},
    {"model": "x"},
    {"model": 3},
    {},
]


@pytest.mark.parametrize(("stage", "name", "setting"), LISTS)
def test_one_entry_or_a_list_of_them_fits_where_it_is_accepted(stage: str, name: str, setting: str) -> None:
    section: Any = STAGES[stage].model_fields[name].annotation
    field, schema = section.model_fields[setting], json_schema(STAGES[stage])
    annotated = (field.annotation, *field.metadata)
    kind: Any = TypeAdapter(Annotated[annotated], config=ConfigDict(strict=True))
    described = schema["$defs"][section.__name__]["properties"][setting]
    alone = 0
    for value in (*ENTRIES, *([entry] for entry in ENTRIES), ["x", {"path": "x"}], []):
        try:
            kind.validate_json(json.dumps(value))
            accepted = True
        except ValidationError:
            accepted = False
        assert fits(value, described, schema) == accepted, value
        alone += accepted and not isinstance(value, list)
    assert alone


@pytest.mark.parametrize("stage", STAGES)
def test_a_section_may_be_empty_where_all_of_it_has_defaults(stage: str) -> None:
    schema = json_schema(STAGES[stage])
    model = dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size"), 8)
    needed: dict[str, Any] = {
        "run": {"dir": "x"},
        "model": model
        | {"num_hidden_layers": 1, "num_attention_heads": 1, "rope_scaling": {"type": "default"}},
        "data": {"train": "x", "sequence_length": 8, "tokenizer": "x"},
        "batch": {"global": 1},
        "optim": {"lr": 1.0},
        "train": {"steps": 1},
        "ppo": {"rewards": {"function": "x.py:f"}},
    }
    given = {name: needed.get(name) for name in STAGES[stage].model_fields if name != "recompute"}
    parse_config(given, STAGES[stage])
    assert fits(given, schema, schema) and fits(given, ANY_STAGE, ANY_STAGE)
    for name in ("run", "model", "data", "batch"):
        assert not fits(given | {name: None}, schema, schema)
