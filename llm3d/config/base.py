"""What every section of the settings is made of."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, core_schema


def whole(value: object) -> object:
    """1e6 is a float in YAML; where a whole number is asked for, it is one."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, Field(ge=0), BeforeValidator(whole)]
Positive = Annotated[int, Field(ge=1), BeforeValidator(whole)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Name = Annotated[str, Field(min_length=1)]


class OneOrMore:
    """Marks a setting that is a list: one entry alone is a list of it. Said in the JSON Schema, too."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_before_validator_function(_as_list, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        listed = handler(schema)
        ways = listed.pop("anyOf", None) or [listed]
        return {"anyOf": [*(way["items"] for way in ways if "items" in way), *ways]}


def _as_list(value: object) -> object:
    values = [value] if isinstance(value, str | dict) else value
    return tuple(values) if isinstance(values, list) else values


class Section(BaseModel):
    # Strict: "8" is not a number and true is not 1.
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
