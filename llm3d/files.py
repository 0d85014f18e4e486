"""Files and directories that are complete or absent, and JSON."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llm3d.errors import InputError


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A path to write a file to; the file has its name, on disk, when the block ends well, and is gone otherwise."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        yield partial
        sync(partial)
        partial.replace(path)
        sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def new_directory(output: str | Path, overwrite: bool, marker: str) -> Iterator[Path]:
    """A directory to write into, which becomes `output` if the block ends well and vanishes if it does not.

    An `output` that exists and is not empty is an InputError; with `overwrite` it is replaced, but only if it
    holds a file named `marker`, which says that it is of the kind that is about to be written.
    """
    output = Path(output).absolute()
    check_output(output, overwrite, marker)
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.partial-{os.getpid()}")
    partial.mkdir()
    try:
        yield partial
        _sync_tree(partial)
        _put_in_place(partial, output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_output(output: Path, overwrite: bool, marker: str) -> None:
    """Raise InputError unless a directory may be written at `output`; cheap, called before long work."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not output.is_dir():
        raise InputError(f"{output}: is a file; name a directory to write to")
    if not overwrite:
        raise InputError(f"{output}: exists and is not empty; name another one, or allow overwriting")
    if not (output / marker).is_file():
        raise InputError(f"{output}: holds no {marker}, so it is not overwritten; name another directory")


def _put_in_place(partial: Path, output: Path) -> None:
    if output.exists() and any(output.iterdir()):
        old = output.with_name(f".{output.name}.replaced-{os.getpid()}")
        output.rename(old)
        partial.rename(output)
        shutil.rmtree(old)
    else:
        partial.rename(output)
    sync(output.parent)


def _sync_tree(root: Path) -> None:
    for path in [*root.rglob("*"), root]:
        sync(path)


def sync(path: Path) -> None:
    """Return when a file's content, or a directory's entries, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one where there is no file, or another value in it."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error}); repair or remove it") from error
    return content if isinstance(content, dict) else {}


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
