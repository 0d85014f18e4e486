"""csrc/*/cuda.cu as a library for the CPU, so that what CUDA kernels compute is tested where there is no GPU."""

from __future__ import annotations

import fcntl
import importlib.util
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import torch

ROOT = Path(__file__).resolve().parents[2]
RUNTIME = Path(__file__).parent / "cuda_on_cpu"
NAMESPACE = "llm3d_on_cpu"
# Undefined behavior, a misaligned load for instance, ends the process with a message.
SANITIZER = "-fsanitize=undefined -fno-sanitize=vptr -fno-sanitize-recover=undefined"
# _FORTIFY_SOURCE would take a jump to another fiber's stack for an error.
OPTIONS = f"-O1 -g1 {SANITIZER} -U_FORTIFY_SOURCE -Wno-unknown-pragmas"


def build_module() -> ModuleType:
    """csrc/build.py, which is no part of the package."""
    spec = importlib.util.spec_from_file_location("csrc_build", ROOT / "csrc" / "build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


build = build_module()


@cache
def emulated() -> torch._ops._OpNamespace:
    """torch.ops.llm3d_on_cpu: the operations that have a cuda.cu, for tensors of the CPU. Builds what is stale.

    Raises build.CannotBuild where there is no C++ compiler.
    """
    installed = build.find_torch()
    names = f"-DLLM3D_NAMESPACE={NAMESPACE} -DLLM3D_CUDA_KEY=CPU"
    flags = (*build.cpp_flags(installed), *OPTIONS.split(), *names.split())
    library = build.Library(
        "cuda_on_cpu",
        (ROOT / "csrc/ops.cpp", *sorted((ROOT / "csrc").glob("*/cuda.cu")), RUNTIME / "examples.cu"),
        (*build.cpp_compiler(), f"-I{RUNTIME}", *flags),
        build.links(installed),
        language=("-x", "c++"),
    )
    scratch = ROOT / "build" / "kernels"
    scratch.mkdir(parents=True, exist_ok=True)
    output = scratch / "cuda_on_cpu.so"
    with open(scratch / "cuda_on_cpu.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several pytest processes may start at once
        build.build(library, output, scratch, jobs=2)
        torch.ops.load_library(output)
    return getattr(torch.ops, NAMESPACE)
