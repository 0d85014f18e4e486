"""Every cuda.cu compiles, for each architecture, into kernels whose variables all fit the registers."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.csrc.emulation import ROOT, build

NVCC = build.find_nvcc()
SOURCES = sorted((ROOT / "csrc").glob("*/cuda.cu"))


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="nvcc is neither on the path nor in CUDA_HOME")
@pytest.mark.skipif(shutil.which("g++") is None, reason="nvcc needs g++")
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.parent.name)
def test_no_kernel_spills(source: Path, tmp_path: Path) -> None:
    flags = build.cuda_flags(build.find_torch())
    command = [str(NVCC), *flags, "-Xptxas=-v", "-c", str(source), "-o", str(tmp_path / "kernels.o")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "warning" not in said, said
    for architecture in build.ARCHITECTURES:
        assert f"for 'sm_{architecture}'" in said
    kernels = re.findall(r"Compiling entry function '(\w+)'", said)
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    assert len(spills) >= len(kernels) > 0
    assert set(spills) == {("0", "0")}, said
