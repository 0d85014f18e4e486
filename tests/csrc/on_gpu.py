"""torch.ops.llm3d on a GPU, for tensors of the CPU: they are copied there and back, as they lie in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class OnGpu:
    def __getattr__(self, name: str) -> Callable[..., Any]:
        op = getattr(torch.ops.llm3d, name)

        def run(*arguments: Any) -> Any:
            memory: dict[int, tuple[Tensor, Tensor]] = {}  # by address: all of a storage, here and on the GPU
            result = op(*(moved(x, memory) if isinstance(x, Tensor) else x for x in arguments))
            torch.cuda.synchronize()
            for here, there in memory.values():
                here.copy_(there)
            return tuple(x.cpu() for x in result) if isinstance(result, tuple) else back(result)

        return run


def moved(x: Tensor, memory: dict[int, tuple[Tensor, Tensor]]) -> Tensor:
    """x on the GPU: with what lies around it, and as many bytes beyond a multiple of 256."""
    storage = x.untyped_storage()
    if storage.data_ptr() not in memory:
        here = torch.empty(0, dtype=torch.uint8).set_(storage)
        memory[storage.data_ptr()] = here, here.cuda()
    there = memory[storage.data_ptr()][1]
    return there.new_empty(0, dtype=x.dtype).set_(
        there.untyped_storage(), x.storage_offset(), x.size(), x.stride()
    )


def back(result: Tensor | None) -> Tensor | None:
    return result if result is None else result.cpu()
