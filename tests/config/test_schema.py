"""The schema that an editor checks a settings file with takes what a run takes, of any stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llm3d.config import json_schema, kind_of
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
    if "type" in schema and not isinstance(value, TYPES[schema["type"]]):
        return False
    if value not in schema.get("enum", [value]) or value != schema.get("const", value):
        return False
    if isinstance(value, list):
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
