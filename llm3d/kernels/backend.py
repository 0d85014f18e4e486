"""Which code computes an operation: the libraries built from csrc, another package's kernels, or plain PyTorch.

LLM3D_KERNELS=auto|native|reference chooses for the process, the setting kernels.backend for a run. `auto` takes
the library wherever there is one; `native` never falls back in silence.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from llm3d.errors import InputError
from llm3d.kernels.sources import stamp

PACKAGES = {"transformer_engine": "transformer-engine", "apex": "apex"}
BACKENDS = ("auto", "native", *PACKAGES, "reference")
INSTRUCTION_SETS = ("avx512", "avx2", "default")
HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"  # in a checkout
OLDEST_GPU = (8, 0)  # A100: what csrc/build.py compiles for
Op = Callable[..., Any]

_libraries: dict[str, Path] = {}  # by device type, what is loaded
_problems: dict[str, str] = {}  # by device type, why nothing is
_ops: dict[str, dict[str, Op]] = {}  # by device type and name; csrc leaves some to PyTorch on some devices
_chosen = "auto"


def use(backend: str, device: torch.device | str | None = None) -> None:
    """Choose for the process from now on; auto leaves the choice to LLM3D_KERNELS.

    Raises InputError where the choice is not one of BACKENDS, its package cannot be imported, or `native` has no
    library for the device (of one that is not named here, operations say so).
    """
    global _chosen
    source = "kernels.backend"
    if backend == "auto":
        source, backend = "LLM3D_KERNELS", os.environ.get("LLM3D_KERNELS", "auto")
    if backend not in BACKENDS:
        raise InputError(f"{source}: {backend!r} is not one of {', '.join(BACKENDS)}")
    if backend in PACKAGES:
        _import_adapter(source, backend)
    if device is not None and torch.device(device).type == "cuda":
        _give_up_on_an_old(torch.device(device))
    if backend == "native" and device is not None and (problem := _problem(device)):
        raise InputError(f"{source}: native, but {problem}")
    _chosen = backend


@contextmanager
def using(backend: str) -> Iterator[None]:
    """Like `use`, for a while."""
    global _chosen
    before = _chosen
    use(backend)
    try:
        yield
    finally:
        _chosen = before


def fused(op: str, x: Tensor) -> Op | None:
    """What computes `op` for tensors such as x in one go; None: the caller's plain PyTorch does.

    Raises InputError where native was chosen and the library of x's device is not there.
    """
    if _chosen == "reference":
        return None
    if _chosen in PACKAGES and x.is_cuda:
        theirs = getattr(importlib.import_module(f"llm3d.kernels.{_chosen}"), op, None)
        if theirs is not None:
            return theirs
    device = "cpu" if x.device.type == "meta" else x.device.type
    if device in _libraries and (device == "cpu" or x.dtype != torch.float64):
        return _ops[device].get(op)
    if _chosen == "native" and (problem := _problem(device)):
        raise InputError(f"kernels.backend: native, but {problem}")
    return None


def is_plain_torch() -> bool:
    """Whether plain PyTorch was chosen for everything."""
    return _chosen == "reference"


def of(op: str, device: torch.device | str) -> str:
    """What computes one operation on a device: native cpu avx512, native cuda, the name of a package, reference."""
    kernel = fused(op, torch.empty(0, device=device))
    if kernel is None:
        return "reference"
    return _name(device) if isinstance(kernel, OpOverload) else _chosen


def describe(device: torch.device | str) -> str:
    """What computes on a device, in a few words, and why where it is not the fastest."""
    if _chosen == "reference":
        return "plain PyTorch, as chosen"
    problem = _problem(device)
    ours = f"plain PyTorch: {problem}" if problem else _name(device)
    if _chosen in PACKAGES and torch.device(device).type == "cuda":
        return f"{_chosen} where it has them, else {ours}"
    return ours


def _import_adapter(source: str, backend: str) -> None:
    try:
        importlib.import_module(f"llm3d.kernels.{backend}")
    except (ImportError, OSError, RuntimeError) as error:
        package = PACKAGES[backend]
        missing = find_spec(backend) is None
        problem = "which is not installed" if missing else f"which cannot be imported: {error}"
        raise InputError(f"{source}: {backend} needs the package {package}, {problem}") from None


def _name(device: torch.device | str) -> str:
    return "native " + _libraries[torch.device(device).type].stem.replace("_", " ")


def _problem(device: torch.device | str) -> str | None:
    """Why there is no library for a device; None: there is one."""
    device_type = torch.device(device).type
    device_type = "cpu" if device_type == "meta" else device_type
    return None if device_type in _libraries else _problems.get(device_type, f"{device_type} has no kernels")


def _give_up_on_an_old(gpu: torch.device) -> None:
    """Not when the library is loaded: asking starts CUDA."""
    if "cuda" in _libraries and torch.cuda.get_device_capability(gpu) < OLDEST_GPU:
        del _libraries["cuda"]
        name = torch.cuda.get_device_name(gpu)
        _problems["cuda"] = f"{name} is older than an A100, which the CUDA kernels are compiled for"


def fake(op: str) -> Callable[[Op], Op]:
    """Registers what `op` returns without data, for tracing: FakeTensor, torch.compile, the meta device."""

    def register(function: Op) -> Op:
        @wraps(function)
        def on_one_device(*arguments: Any) -> Any:
            if len({x.device for x in arguments if isinstance(x, Tensor)}) > 1:
                raise RuntimeError("the tensors are not all on one device")
            return function(*arguments)

        if "cpu" in _libraries:
            torch.library.register_fake(f"llm3d::{op}", on_one_device)
        return function

    return register


def _load() -> None:
    """Load the library of each device."""
    capability = torch.backends.cpu.get_cpu_capability().lower()
    fitting = INSTRUCTION_SETS[INSTRUCTION_SETS.index(capability) if capability in INSTRUCTION_SETS else -1 :]
    _load_first("cpu", [HERE / f"cpu_{name}.so" for name in fitting])
    if torch.version.cuda is None:
        _problems["cuda"] = "this torch is built without CUDA"
    elif "cpu" in _libraries:
        _load_first("cuda", [HERE / "cuda.so"])
    else:
        _problems["cuda"] = _problems["cpu"]


def _load_first(device: str, candidates: list[Path]) -> None:
    path = next((path for path in candidates if path.exists()), None)
    if path is None:
        _problems[device] = (
            f"{candidates[0]} is not there; installing llm3d there builds it where there is "
            f"{'a C++ compiler' if device == 'cpu' else 'nvcc, and a torch for its CUDA version'}"
        )
        return
    if (CSRC / "ops.cpp").exists() and stamp(CSRC).encode() not in path.read_bytes():
        _problems[device] = f"{path} was built from other sources than {CSRC} holds; install llm3d again"
        return
    try:
        torch.ops.load_library(path)
        _libraries[device] = path
        _ops[device] = _registered(device.upper())
    except OSError as error:
        _problems[device] = f"{path} cannot be loaded: {error.__cause__ or error}"


def _registered(dispatch_key: str) -> dict[str, Op]:
    """By name, the operations that the libraries have for it."""
    every = (name.split("::") for name in torch._C._dispatch_get_all_op_names())
    return {
        name: getattr(torch.ops.llm3d, name).default
        for namespace, name in every
        if namespace == "llm3d"
        and torch._C._dispatch_has_kernel_for_dispatch_key(f"llm3d::{name}", dispatch_key)
    }


_load()
use("auto")
