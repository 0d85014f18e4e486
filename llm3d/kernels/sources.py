"""Which sources a library was built from: its file holds their digest. Imports nothing that building has not."""

from __future__ import annotations

import hashlib
from pathlib import Path


def stamp(csrc: Path) -> str:
    """What a library that was built from these C++ and CUDA sources holds."""
    digest = hashlib.sha256()
    for path in sorted(path for path in csrc.rglob("*") if path.suffix in (".h", ".cuh", ".cpp", ".cu")):
        digest.update(f"{path.relative_to(csrc).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return f"llm3d sources {digest.hexdigest()}"
