"""The host's memory: how the C library hands it out, and how much there is."""

from __future__ import annotations

import ctypes
import functools
import platform
from pathlib import Path
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


def keep_freed_memory() -> None:
    """Make glibc keep the memory of freed tensors instead of returning it to the kernel; elsewhere do nothing.

    By default each tensor above 32 MB is mapped anew, and the kernel zeroes every page of it at first touch: up
    to a third of a training step on the CPU. The process's memory then stays at its peak.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes that processes of this host can still take: what the kernel has, and what the container may; None where
    neither says (not on Linux).
    """
    limits = [_meminfo(root / "proc/meminfo"), *_cgroup(root / "sys/fs/cgroup")]
    return min((limit for limit in limits if limit is not None), default=None)


def _meminfo(path: Path) -> int | None:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    amounts = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(amounts[0]) * 1024 if amounts else None


def _cgroup(path: Path) -> list[int | None]:
    """What a memory limit leaves, of control groups of version 2 and of version 1."""
    return [
        _left(path / "memory.max", path / "memory.current", path / "memory.stat", ""),
        _left(
            path / "memory/memory.limit_in_bytes",
            path / "memory/memory.usage_in_bytes",
            path / "memory/memory.stat",
            "total_",
        ),
    ]


def _left(limit: Path, used: Path, stat: Path, prefix: str) -> int | None:
    """The limit less what is used; the contents of files that are kept in memory make way."""
    try:
        return int(limit.read_text()) - int(used.read_text()) + _file_cache(stat, prefix)
    except (OSError, ValueError):  # no such group, or "max"
        return None


def _file_cache(stat: Path, prefix: str) -> int:
    names = (f"{prefix}active_file", f"{prefix}inactive_file")
    lines = [line.split() for line in stat.read_text().splitlines()] if stat.exists() else []
    return sum(int(value) for name, value in lines if name in names)


# ---- measuring ----


def allocated_bytes() -> int:
    """What this process has from the C library now, all threads together. Needs glibc 2.33."""
    info = _mallinfo2()()
    return int(info.uordblks + info.hblkhd)


@functools.cache
def _mallinfo2() -> Any:
    function = ctypes.CDLL(None).mallinfo2
    function.restype = _MallInfo
    return function


class _MallInfo(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


class PeakAllocated(TorchDispatchMode):
    """Use as a context manager: `peak` is the most bytes after any operation in the block, over those before it."""

    def __init__(self) -> None:
        super().__init__()
        self.peak, self.before = 0, allocated_bytes()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(returned.alias_info is None for returned in func._schema.returns):  # not a view, not in place
            self.peak = max(self.peak, allocated_bytes() - self.before)
        return result
