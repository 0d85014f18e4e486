"""The sections of the settings, and the names in each."""

from __future__ import annotations

from llm3d.config import PretrainConfig, json_schema

SECTIONS = {
    name: json_schema(PretrainConfig)["$defs"]
    .get(field.get("$ref", "").rpartition("/")[2], {})
    .get("properties", {})
    for name, field in json_schema(PretrainConfig)["properties"].items()
}
