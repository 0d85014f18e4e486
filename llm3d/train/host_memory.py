"""How the C library hands out memory for tensors on the CPU."""

from __future__ import annotations

import ctypes
import platform

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
