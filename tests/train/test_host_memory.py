"""Freed memory is kept where the C library can be asked to; elsewhere nothing happens."""

from __future__ import annotations

import platform
from typing import Any
from unittest import mock

import pytest

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
