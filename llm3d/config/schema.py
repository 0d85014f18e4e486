"""The JSON Schema of a settings file, with which editors complete and check one."""

from __future__ import annotations

from typing import Any

from llm3d.config.presets import PRESETS
from llm3d.config.stages import STAGES, Config


def json_schema(kind: type[Config] | None = None) -> dict[str, Any]:
    """Of a stage's settings; None: of any stage's, which is told by the section that only it has."""
    if kind is not None:
        return _of_stage(kind)
    schemas = {name: _of_stage(stage) for name, stage in STAGES.items()}
    definitions: dict[str, Any] = {}
    for name, schema in schemas.items():
        own = schema.pop("$defs")
        definitions |= {f"{name}.{part}": _moved(content, name) for part, content in own.items()}
    branches: Any = _moved(schemas.pop("pretrain"), "pretrain")
    for name, schema in schemas.items():
        branches = {"if": {"required": [name]}, "then": _moved(schema, name), "else": branches}
    return {"$defs": definitions, "type": "object", **branches}


def _moved(schema: Any, stage: str) -> Any:
    """With definitions that are found under the stage's name."""
    if isinstance(schema, list):
        return [_moved(item, stage) for item in schema]
    if not isinstance(schema, dict):
        return schema
    start = "#/$defs/"
    return {
        key: value.replace(start, f"{start}{stage}.") if key == "$ref" else _moved(value, stage)
        for key, value in schema.items()
    }


def _of_stage(kind: type[Config]) -> dict[str, Any]:
    schema = kind.model_json_schema(by_alias=True)
    definitions = schema["$defs"]
    model = definitions["ModelConfig"]
    del model["required"]  # model.preset or model.path may stand in for the shape
    preset = {
        "enum": list(PRESETS),
        "description": "Model preset: a shape by name; other keys override its fields.",
    }
    model["properties"] = {"preset": preset} | model["properties"]
    rope = definitions["RopeScaling"]
    rope["properties"]["type"] = rope["properties"]["rope_type"] | {"description": "Old name of rope_type."}
    rope["required"] = ["factor"]
    definitions["RopeScaling"] = {"anyOf": [rope, *map(_no_scaling, ("rope_type", "type"))]}
    schema["required"] = ["run", "model", "data", "batch", "optim", "train"]
    for section in schema["properties"].values():  # one that is named and left empty takes its defaults
        definition = definitions[section["$ref"].rpartition("/")[2]] if "$ref" in section else {}
        if definition.get("type") == "object" and not definition.get("required") and definition is not model:
            definition["type"] = ["object", "null"]
    return schema


def _no_scaling(name: str) -> dict[str, Any]:
    """What transformers writes where positions are not stretched."""
    return {"type": "object", "properties": {name: {"const": "default"}}, "required": [name]}
