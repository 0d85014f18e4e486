"""Freed memory is kept where the C library can be asked to; what a host has left is the least that anything says."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from llm3d.train import host_memory


@pytest.mark.parametrize(("library", "calls"), [(("glibc", "2.36"), [(-4, 0), (-1, -1)]), (("", ""), [])])
def test_only_glibc_is_asked(
    library: tuple[str, str], calls: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: Any = mock.Mock()
    monkeypatch.setattr(platform, "libc_ver", lambda: library)
    monkeypatch.setattr(host_memory.ctypes, "CDLL", opened)
    host_memory.keep_freed_memory()
    assert [call.args for call in opened.return_value.mallopt.call_args_list] == calls


# ---- how much there is ----

MEMINFO = "MemTotal: 2000 kB\nMemFree: 10 kB\nMemAvailable:    1000 kB\n"


def host(root: Path, **files: str) -> Path:
    """A root directory with some files; a double underscore stands for a slash."""
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("ON", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_the_least_of_host_and_container_counts(tmp_path: Path) -> None:
    assert host_memory.available_memory(tmp_path) is None, "nothing says"
    host(tmp_path, proc__meminfo=MEMINFO)
    assert host_memory.available_memory(tmp_path) == 1000 * 1024
    host(tmp_path, sys__fs__cgroup__memoryONmax="max\n", sys__fs__cgroup__memoryONcurrent="5\n")
    assert host_memory.available_memory(tmp_path) == 1000 * 1024, "no limit"
    host(tmp_path, sys__fs__cgroup__memoryONmax="500000\n")
    assert host_memory.available_memory(tmp_path) == 499_995
    host(tmp_path, sys__fs__cgroup__memoryONstat="anon 7\ninactive_file 3\nactive_file 2\n")
    assert host_memory.available_memory(tmp_path) == 500_000, "files in memory make way"
    old = tmp_path / "sys/fs/cgroup/memory"
    old.mkdir()
    (old / "memory.limit_in_bytes").write_text("300000")
    (old / "memory.usage_in_bytes").write_text("100000")
    (old / "memory.stat").write_text("inactive_file 9\ntotal_inactive_file 40\ntotal_active_file 2\n")
    assert host_memory.available_memory(tmp_path) == 200_042


def test_what_is_allocated_is_counted() -> None:
    with host_memory.PeakAllocated():
        torch.empty(1)  # the first time, modules are loaded
    with host_memory.PeakAllocated() as allocated:
        one = torch.empty(2**20)
        two = torch.empty(2**20)
        del one
        three = torch.empty(2**18)
    assert 2 * 2**22 <= allocated.peak < 2 * 2**22 + 2**20
    assert len(two) + len(three) == 2**20 + 2**18
