"""Runs a Python program as if there were a GPU, on the CPU: its lines for CUDA run, without what they are for.

    python benchmarks/stub_cuda.py benchmarks/throughput.py llama-tiny
    python benchmarks/stub_cuda.py -m llm3d kernels --check --device cuda

Tensors that are to be made on a GPU are made on the CPU; streams, events and graphs do nothing; NCCL is gloo. So a slip
in a program is found without a GPU. What a GPU computes is not.
"""

from __future__ import annotations

import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from llm3d.kernels import backend


class OnTheCPU(TorchFunctionMode):
    """Whatever asks for a GPU gets the CPU, and pinned memory is memory."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        kwargs.pop("pin_memory", None)
        if func is torch.Tensor.pin_memory:
            return args[0]
        if func in (torch.device, torch.Tensor.__repr__):
            return func(*args, **kwargs)
        return func(*tree_map(on_the_cpu, args), **tree_map(on_the_cpu, kwargs))


def on_the_cpu(value: Any) -> Any:
    is_gpu = isinstance(value, torch.device) and value.type == "cuda"
    return torch.device("cpu") if is_gpu or (isinstance(value, str) and value.startswith("cuda")) else value


class Nothing:
    """Can be called, entered and asked for anything."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.at = time.perf_counter()
        self.device = torch.device("cuda", 0)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: Nothing()

    def __int__(self) -> int:
        return 0

    def __enter__(self) -> Nothing:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def record(self, *_: Any) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, later: Nothing) -> float:
        """Of an event, in ms."""
        return max(1e3 * (later.at - self.at), 1e-3)


class Generator:
    """One of the CPU's."""

    make = torch.Generator

    def __new__(cls, device: Any = None) -> torch.Generator:  # type: ignore[misc]
        return cls.make()


WITHOUT_RESULT = (
    *("Stream", "Event", "CUDAGraph", "current_stream", "default_stream", "cudart", "graph", "stream"),
    *("synchronize", "set_device", "empty_cache", "reset_peak_memory_stats", "check_error"),
)


def put_in_place() -> None:
    """Instead of torch.cuda's functions and of NCCL."""
    properties = SimpleNamespace(
        name="stub H200", multi_processor_count=132, total_memory=2**37, major=9, minor=0
    )
    instead: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda *_: "stub H200",
        "get_device_capability": lambda *_: (9, 0),
        "get_device_properties": lambda *_: properties,
        "mem_get_info": lambda *_: (2**30, 2**37),
        "max_memory_allocated": lambda *_: 0,
        "memory_allocated": lambda *_: 0,
        "graph_pool_handle": lambda: (0, 0),
    }
    # Each its own: PyTorch tells functions apart.
    instead |= {name: type(name, (Nothing,), {}) for name in WITHOUT_RESULT}
    for name, stub in instead.items():
        setattr(torch.cuda, name, stub)
    make, join = dist.init_process_group, dist.new_group
    dist.init_process_group = lambda backend=None, **kwargs: make("gloo", **for_gloo(kwargs))
    dist.new_group = lambda *args, **kwargs: join(*args, **for_gloo(kwargs))
    dist.ProcessGroupNCCL = SimpleNamespace(Options=type("Options", (Nothing,), {}))  # type: ignore[misc, assignment]
    torch.Generator = Generator  # type: ignore[misc, assignment]
    torch.use_deterministic_algorithms = torch._C._set_deterministic_algorithms  # else imports the compiler
    # The native kernels' names, and those of the CPU under them.
    backend._libraries["cuda"], backend._ops["cuda"] = backend.HERE / "cuda.so", backend._ops.get("cpu", {})


def for_gloo(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name in ("store", "rank", "world_size", "ranks")}


def main(argv: list[str]) -> None:
    put_in_place()
    with OnTheCPU():
        if argv[0] == "-m":
            sys.argv = argv[1:]
            runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = argv
            sys.path[0] = str(Path(argv[0]).parent)
            runpy.run_path(argv[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
