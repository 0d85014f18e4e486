"""From pydantic's errors to a line for each setting at fault: its path, what was given, what is allowed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

from pydantic import ValidationError

from llm3d.config.aliases import setting_called, value_called
from llm3d.config.base import Section
from llm3d.config.data import DataSource
from llm3d.config.sections import ModelConfig, RewardSource
from llm3d.config.stages import STAGES, Config
from llm3d.errors import InputError

S = TypeVar("S", bound=Section)


def validate(kind: type[S], settings: dict[Any, Any], path: tuple[str, ...] = (), source: str = "") -> S:
    try:
        # As JSON: there, and not from Python objects, strict lists become tuples and mappings sections.
        return kind.model_validate_json(json.dumps(settings, default=show))
    except ValidationError as invalid:
        root = kind if issubclass(kind, Config) else Config
        problems: dict[str, str] = {}
        for error in invalid.errors(include_url=False):
            if error["type"] != "default_factory_not_called":
                where, allowed = _locate((*path, *error["loc"]), root)
                problems.setdefault(where, f"{where}: {_describe(error, where, allowed, root)}{source}")
        # Of a union's complaints about one setting, keep those about its entries.
        outer = {where.partition("[")[0] for where in problems if "[" in where}
        raise InputError("\n".join(problems[where] for where in problems if where not in outer)) from None


def _locate(location: tuple[int | str, ...], root: type[Config]) -> tuple[str, list[str]]:
    """The setting's path as the user writes it, and the names that its section has."""
    where, allowed, in_union = "", list[str](), False
    section: type[Section] | None = root
    for part in location:
        if isinstance(part, int):
            where += f"[{part}]"
        elif in_union or section is None:
            in_union = False  # pydantic names the member of a union here; the user does not
        else:
            fields = {field.alias or name: field for name, field in section.model_fields.items()}
            allowed = [*fields, "preset"] if section is ModelConfig else list(fields)
            where = f"{where}.{part}" if where else part
            annotation = fields[part].annotation if part in fields else None
            section, in_union = section_in(annotation), _is_union(annotation)
    return where, allowed


def _is_union(annotation: object) -> bool:
    """Whether an annotation names several types beside None."""
    members = [member for member in get_args(annotation) if member is not type(None)]
    return get_origin(annotation) in (Union, UnionType) and len(members) > 1


def section_in(annotation: object) -> type[Section] | None:
    """Return the section that a field holds, itself or as an entry of a list."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next((section for section in map(section_in, get_args(annotation)) if section), None)


# By pydantic's type of error; what its context holds goes in.
_MESSAGES = {
    "int_type": "is not a whole number",
    "int_from_float": "is not a whole number",
    "float_type": "is not a number",
    "finite_number": "is not a finite number",
    "bool_type": "is neither true nor false",
    "string_type": "is not text (a number that is meant as text needs quotes)",
    "string_too_short": "is empty",
    "tuple_type": "is not a list",
    "too_short": "has fewer entries than the {min_length} needed",
    "too_long": "has more entries than the {max_length} allowed",
    "model_type": "is not a section with settings of its own",
    "greater_than": "is not above {gt:g}",
    "greater_than_equal": "is below {ge:g}, the least allowed",
    "less_than": "is not below {lt:g}",
    "literal_error": "is not {expected}",
}


def _describe(error: Any, where: str, allowed: list[str], root: type[Config]) -> str:
    kind, given = error["type"], error["input"]
    if kind == "missing":
        return "missing" + ("; give its preset, path or sizes" if where == "model" else "")
    if kind == "extra_forbidden":
        return _unknown(where, allowed, root)
    if kind == "value_error":
        return str(error["ctx"]["error"])
    message = _MESSAGES.get(kind, error["msg"]).format_map(error.get("ctx", {}))
    choices = re.findall("'([^']*)'", message) if kind == "literal_error" else []
    known = value_called(where, given) if choices else None
    return f"{show(given)} {message}" + (f"; did you mean {known}?" if known else nearest(given, choices))


def _unknown(where: str, allowed: list[str], root: type[Config]) -> str:
    """What others call so, else the same name in another section, else the nearest in this one, else what there is."""
    section, _, name = where.rpartition(".")
    if where in STAGES and root is not Config and root.stage in allowed:
        return f"unknown setting; in settings for {root.stage} this section is {root.stage}"
    paths = [path for path, _ in setting_paths(root)]
    known = setting_called(name, paths)
    elsewhere = [path for path in paths if path.rpartition(".")[2] == name]
    beside = [f"{section}.{sibling}" if section else sibling for sibling in get_close_matches(name, allowed)]
    guess = "".join(f"; did you mean {path}?" for path in ([known] if known else elsewhere or beside)[:1])
    names = f"; {section or 'a settings file'} has {', '.join(allowed)}"
    return f"unknown setting{guess or names}"


def setting_paths(kind: type[Section], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The settings of a section and of those in it, and what may stand there."""
    for name, field in kind.model_fields.items():
        path = prefix + (field.alias or name)
        section = section_in(field.annotation)
        if section is None or issubclass(section, DataSource | RewardSource):  # entries of a list
            yield path, field.annotation
        else:
            yield from setting_paths(section, f"{path}.")


def nearest(given: object, names: Iterable[str]) -> str:
    close = get_close_matches(str(given), list(names), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def show(value: object) -> str:
    """A value as in YAML, on one line, not too long."""
    if isinstance(value, str):
        return repr(value)
    text = json.dumps(value, default=repr)
    return text if len(text) <= 80 else f"{text[:76]} ..."
