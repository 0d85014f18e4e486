"""The JSON Schema of a settings file, with which editors complete and check one."""

from __future__ import annotations

from typing import Any

from llm3d.config.presets import PRESETS
from llm3d.config.sections import Config, PretrainConfig


def json_schema(kind: type[Config] = PretrainConfig) -> dict[str, Any]:
    schema = kind.model_json_schema(by_alias=True)
    definitions = schema["$defs"]
    model = definitions["ModelConfig"]
    del model["required"]  # model.preset or model.path may stand in for the shape
    preset = {"enum": list(PRESETS), "description": "A shape by name; other keys override its fields."}
    model["properties"] = {"preset": preset} | model["properties"]
    data = definitions[schema["properties"]["data"]["$ref"].rpartition("/")[2]]["properties"]
    source = data["train"]["items"]["$ref"]
    for sources in (data["train"], data["valid"]):
        sources["anyOf"] = [{"$ref": source}, {"type": "array", "items": sources.pop("items")}]
        del sources["type"]
    name = source.rpartition("/")[2]
    definitions[name] = {"anyOf": [{"type": "string"}, definitions[name]]}
    rope = definitions["RopeScaling"]
    rope["properties"]["type"] = rope["properties"]["rope_type"] | {"description": "Old name of rope_type."}
    rope["required"] = ["factor"]
    schema["required"] = ["run", "model", "data", "batch", "optim", "train"]
    return schema
