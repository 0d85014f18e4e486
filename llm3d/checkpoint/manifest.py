"""manifest.json of a checkpoint: what lies where in it, with a checksum of every part and of itself."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

import llm3d
from llm3d.checkpoint.box_files import StoredBox
from llm3d.errors import InputError
from llm3d.parallel.boxes import Box

FILE = "manifest.json"
FORMAT = 1


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class StoredPiece(_Part):
    """A box of a tensor: where it lies in the tensor and in which file."""

    file: str
    key: str
    offset: tuple[int, ...]
    size: tuple[int, ...]
    crc32: int


class StoredTensor(_Part):
    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[StoredPiece, ...]


class Manifest(_Part):
    """tensors: by global name; those of the optimizer's state `exp_avg` are named `exp_avg/<name of the weight>`.

    files: crc32 of the other files.  layout: of the ranks that saved; for information.
    """

    format: int
    llm3d: str
    step: int
    optimizer_steps: int
    layout: dict[str, int]
    files: dict[str, int]
    tensors: dict[str, StoredTensor]

    def boxes(self, name: str) -> list[StoredBox]:
        tensor = self.tensors[name]
        return [
            StoredBox(
                piece.file,
                piece.key,
                Box(name, tensor.shape, piece.offset, piece.size),
                tensor.dtype,
                piece.crc32,
            )
            for piece in tensor.pieces
        ]


def manifest_text(
    step: int,
    optimizer_steps: int,
    layout: dict[str, int],
    files: dict[str, int],
    boxes: Iterable[StoredBox],
) -> str:
    tensors: dict[str, dict[str, Any]] = {}
    for stored in sorted(boxes, key=lambda stored: (stored.box.name, stored.box.offset)):
        tensor = tensors.setdefault(
            stored.box.name, {"dtype": stored.dtype, "shape": stored.box.shape, "pieces": []}
        )
        place = {"offset": stored.box.offset, "size": stored.box.size}
        tensor["pieces"].append({"file": stored.file, "key": stored.key, **place, "crc32": stored.crc32})
    content = {
        "format": FORMAT,
        "llm3d": llm3d.__version__,
        "step": step,
        "optimizer_steps": optimizer_steps,
        "layout": layout,
        "files": files,
        "tensors": tensors,
    }
    return json.dumps({"checksum": _checksum(content), **content}, indent=1) + "\n"


def read_manifest(checkpoint: Path) -> Manifest:
    """Raises InputError where it is missing, damaged or of a format that this version does not know."""
    path = checkpoint / FILE
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{checkpoint}: not a complete checkpoint, it has no {FILE}; name another") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise InputError(_damaged(path)) from None
    if isinstance(content, dict) and isinstance(content.get("format"), int) and content["format"] != FORMAT:
        raise InputError(
            f"{path}: format {content['format']} is not the format {FORMAT} that llm3d {llm3d.__version__} reads; "
            f"it was written by llm3d {content.get('llm3d')}"
        )
    if not isinstance(content, dict) or content.pop("checksum", None) != _checksum(content):
        raise InputError(_damaged(path))
    try:
        return Manifest.model_validate_json(json.dumps(content))
    except ValidationError:
        raise InputError(_damaged(path)) from None


def _damaged(path: Path) -> str:
    return f"{path}: damaged; remove it and start again, from the checkpoint before it"


def _checksum(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())
