"""Every setting is described by its standard name, as editors show it and docs/settings.md lists it."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic.fields import FieldInfo

from llm3d.config import STAGES
from llm3d.config.base import Section
from llm3d.config.explain import section_in

DOCS = Path(__file__).parent.parent.parent / "docs"
NO_TERM = ("Of", "To", "Times", "How", "What", "By", "Whether", "As")


def fields(section: type[Section], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    for name, field in section.model_fields.items():
        inner, path = section_in(field.annotation), f"{prefix}{field.alias or name}"
        if inner is None or prefix:  # a top-level section is described by its class
            yield path, field
        if inner is not None:
            yield from fields(inner, f"{path}.")


FIELDS = {f"{stage}: {path}": field for stage, kind in STAGES.items() for path, field in fields(kind)}


@pytest.mark.parametrize("path", FIELDS)
def test_a_description_begins_with_the_term(path: str) -> None:
    description = FIELDS[path].description
    assert description, "every setting has one"
    first = description.split()[0].strip(":,.")
    assert first not in NO_TERM
    assert description[0].isupper() or first.replace("-", "_") in path


@pytest.mark.parametrize("stage", STAGES)
def test_every_section_is_described_by_a_sentence_of_its_own(stage: str) -> None:
    sections = [section_in(field.annotation) for field in STAGES[stage].model_fields.values()]
    for section in filter(None, sections):
        assert re.match(r"[A-Z].*\.$", (section.__doc__ or "").partition("\n\n")[0]), section


def test_the_reference_of_settings_is_that_of_the_code() -> None:
    spec = importlib.util.spec_from_file_location("write_settings", DOCS / "write_settings.py")
    assert spec is not None and spec.loader is not None
    writer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(writer)
    assert writer.PAGE.read_text(encoding="utf-8") == writer.page(), "run python docs/write_settings.py"
