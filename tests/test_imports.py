"""Who may enter which room, that a name is one class, and what asking for help does not wait for."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "llm3d"

DIAGRAM = (PACKAGE.parent / "docs/ARCHITECTURE.md").read_text(encoding="utf-8")


def edges(diagram: str) -> dict[str, set[str]]:
    """The rooms of a mermaid diagram, and those that each points to."""
    found: dict[str, set[str]] = {}
    for above, under in re.findall(r"^ +(\w+) --> (\w+)$", diagram, re.MULTILINE):
        found.setdefault(above, set()).add(under)
        found.setdefault(under, set())
    return found


NEXT_BELOW = edges(DIAGRAM)
FOR_ALL = {"config", "errors", "files", "permutation", "wording"}


def below(room: str) -> set[str]:
    return NEXT_BELOW[room] | {deeper for lower in NEXT_BELOW[room] for deeper in below(lower)}


def imports(path: Path) -> Iterator[str]:
    """Full names of the modules that a file imports, wherever in the file."""
    here = ["llm3d", *path.relative_to(PACKAGE).with_suffix("").parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level] if node.level else []
            module = [*base, *(node.module or "").split(".")]
            # `from llm3d import config` names a module after the import.
            yield from (".".join([*filter(None, module), alias.name]) for alias in node.names)


def room(module: str) -> str:
    return module.split(".")[1]


FILES = sorted(PACKAGE.rglob("*.py"))


def test_the_diagram_has_every_room_and_no_other() -> None:
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    files = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"}
    assert set(NEXT_BELOW) == (packages | files) - FOR_ALL
    listed = set(re.findall(r"^\| `(\w+)` \|", DIAGRAM, re.MULTILINE))
    assert listed == packages | set(NEXT_BELOW), "each has a line in the table"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_imports_upward(path: Path) -> None:
    own = path.relative_to(PACKAGE).with_suffix("").parts[0]
    if own in ("__init__", "__main__"):
        return
    allowed = FOR_ALL if own in FOR_ALL else FOR_ALL | {own} | below(own)
    entered = {room(module) for module in imports(path) if module.startswith("llm3d.")}
    assert entered - {"__version__"} <= allowed


def test_no_two_classes_have_one_name() -> None:
    found: dict[str, list[str]] = {}
    for path in FILES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found.setdefault(node.name, []).append(str(path.relative_to(PACKAGE)))
    assert not {name: places for name, places in found.items() if len(places) > 1}


def loaded_by(module: str) -> set[str]:
    """What a fresh interpreter has loaded after importing a module."""
    code = f"import sys, {module}; print(*sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(output.stdout.split())


def test_help_waits_for_no_heavy_library() -> None:
    assert not {"torch", "numpy", "pydantic", "omegaconf", "rich"} & loaded_by("llm3d.cli")


def test_settings_are_read_without_torch() -> None:
    assert not {"torch", "numpy"} & loaded_by("llm3d.config")
