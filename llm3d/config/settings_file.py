"""Settings files: YAML with `section.key=value` overrides in, a plain dictionary out; and back.

Knows YAML's ways of going wrong, not what the settings mean: that is `llm3d.config`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from llm3d.errors import InputError


def read_settings(given: str | Path | dict[str, Any], overrides: Sequence[str] = ()) -> dict[Any, Any]:
    """What a YAML file and the overrides on top of it say, interpolations resolved. Raises InputError.

    given: the file, or what would be in it.
    An override replaces what it names; one of model.preset or model.path replaces the file's model section.
    """
    settings = OmegaConf.create(_escape(given)) if isinstance(given, dict) else _read_yaml(given)
    if any(override.startswith(("model.preset=", "model.path=")) for override in overrides):
        settings["model"] = {}
    for override in overrides:
        _apply_override(settings, override)
    try:
        resolved = OmegaConf.to_container(settings, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise InputError(f"{error.full_key}: {_first_line(error)}") from None
    assert isinstance(resolved, dict)
    return resolved


def settings_to_yaml(settings: dict[str, Any]) -> str:
    """YAML that `read_settings` reads back as the same dictionary."""
    return OmegaConf.to_yaml(OmegaConf.create(_escape(settings)))


# With the backslashes before it, which OmegaConf then reads in pairs.
_INTERPOLATION = re.compile(r"(\\*)\$\{")


def _escape(value: Any) -> Any:
    """Text that OmegaConf would take for an interpolation."""
    if isinstance(value, dict):
        return {key: _escape(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escape(item) for item in value]
    return _INTERPOLATION.sub(r"\1\1\\${", value) if isinstance(value, str) else value


def _read_yaml(path: str | Path) -> DictConfig:
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start} of the file)") from None
    except IsADirectoryError:
        raise InputError(f"{path}: a directory; give the YAML file in it") from None
    except OSError as error:
        raise InputError(f"{path}: {(error.strerror or 'cannot be read').lower()}") from None
    try:
        root = yaml.compose(text, yaml.SafeLoader)
        if root is None:
            raise InputError(f"{path}: no settings in it")
        if not isinstance(root, yaml.MappingNode):
            raise InputError(
                f"{path}: {_KINDS[type(root)]}; it must be sections, such as `run:`, with settings"
            )
        settings = OmegaConf.create(text)  # refuses duplicate keys
        assert isinstance(settings, DictConfig)
        return settings
    except yaml.YAMLError as error:
        raise InputError(f"{path}{_yaml_problem(error)}") from None
    except OmegaConfBaseException as error:
        raise InputError(f"{path}: {error.full_key or 'top level'}: {_first_line(error)}") from None
    except RecursionError:
        raise InputError(f"{path}: nested too deeply") from None


_KINDS = {yaml.SequenceNode: "a list", yaml.ScalarNode: "a single value"}


def _yaml_problem(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        problem = (error.problem or "").replace("found duplicate key", "duplicate key")
        return f", line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}: {problem}"
    return f": not YAML: {getattr(error, 'reason', None) or _first_line(error)}"


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _apply_override(settings: DictConfig, override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals:
        raise InputError(f"override {override!r}: write it as section.key=value")
    if not all(part.strip() for part in key.split(".")):
        raise InputError(f"override {override!r}: no setting has the name {key!r}; write section.key=value")
    if not value.strip():
        raise InputError(f"override {override!r}: no value after `=`; `{key}=null` sets none")
    try:
        parsed = OmegaConf.from_dotlist([f"value={value}"])._get_node("value")
        OmegaConf.update(settings, key, parsed, merge=False, force_add=True)
    except yaml.YAMLError as error:
        raise InputError(f"override {override!r}: {getattr(error, 'problem', None) or error}") from None
    except (IndexError, ValueError):
        raise InputError(f"override {override!r}: {key} names no entry of its list") from None
    except (OmegaConfBaseException, RecursionError) as error:
        raise InputError(f"override {override!r}: {_first_line(error)}") from None
