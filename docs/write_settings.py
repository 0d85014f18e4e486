"""Write docs/settings.md, the reference of all settings, from the descriptions in llm3d/config.

python docs/write_settings.py
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pydantic.fields import FieldInfo

from llm3d.config import STAGES
from llm3d.config.base import Section
from llm3d.config.explain import section_in, show

PAGE = Path(__file__).parent / "settings.md"
INTRODUCTION = """# Settings

A settings file is YAML with these sections; `section.key=value` on the command line replaces what the file says. A
wrong name, type or value ends the command with the setting's path before anything starts. `llm3d config FILE` prints
all settings as a run would have them. `llm3d config --schema > schema.json` writes a JSON Schema, with which an editor
completes and checks a file. `model.preset=NAME` stands for the fields of a published shape.

A name of another framework is answered with the name that llm3d has for it; [coming from other
frameworks](coming-from.md) lists the most common ones. In the tables, *required* means that there is no default;
*derived* means that the default follows from other settings, as the description says.

The tables are written by `python docs/write_settings.py` from the descriptions in [llm3d/config](../llm3d/config).
"""


def page() -> str:
    """The whole text of docs/settings.md."""
    return INTRODUCTION + "".join(_tables())


def _tables() -> Iterator[str]:
    """A heading and a table for each section, in the order of the stages' settings; equal ones once."""
    written: dict[type[Section], str] = {}
    stages = {
        kind: [stage for stage, config in STAGES.items() if _sections(config).get(name) is kind]
        for config in STAGES.values()
        for name, kind in _sections(config).items()
    }
    for config in STAGES.values():
        for name, kind in _sections(config).items():
            if kind not in written:
                written[kind] = name
                where = "" if len(stages[kind]) == len(STAGES) else f" ({', '.join(stages[kind])})"
                yield f"\n## {name}{where}\n\n{_summary(kind)}\n\n" + _table(name, kind)
    recompute = next(iter(STAGES.values())).model_fields["recompute"]
    yield "\n## recompute\n\nA setting of its own, not a section.\n\n" + _HEAD + _row("recompute", recompute)


def _sections(config: type[Section]) -> dict[str, type[Section]]:
    found = {name: section_in(field.annotation) for name, field in config.model_fields.items()}
    return {name: section for name, section in found.items() if section is not None}


def _summary(kind: type[Section]) -> str:
    return (kind.__doc__ or "").partition("\n\n")[0]


_HEAD = "| setting | default | description |\n|---|---|---|\n"


def _table(prefix: str, kind: type[Section]) -> str:
    return _HEAD + "".join(_rows(prefix, kind))


def _rows(prefix: str, kind: type[Section]) -> Iterator[str]:
    """A row for each setting; below one that has settings of its own, a row for each of these."""
    for name, field in kind.model_fields.items():
        path = f"{prefix}.{field.alias or name}"
        yield _row(path, field)
        inner = section_in(field.annotation)
        if inner is not None:
            yield from _rows(path, inner)


def _row(path: str, field: FieldInfo) -> str:
    described = " ".join((field.description or "").split())
    return f"| `{path}` | {_default(field)} | {described.replace('|', chr(92) + '|')} |\n"


def _default(field: FieldInfo) -> str:
    if field.default_factory is not None:
        return "*derived*"
    if field.is_required():
        return "*required*"
    default = field.default
    if isinstance(default, Section):
        return ""
    return f"`{show(list(default) if isinstance(default, tuple) else default).strip(chr(39))}`"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
