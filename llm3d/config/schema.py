"""The JSON Schema of a settings file, with which editors complete and check one."""

from __future__ import annotations

from typing import Any

from llm3d.config.presets import PRESETS
from llm3d.config.sections import Config


def json_schema() -> dict[str, Any]:
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
