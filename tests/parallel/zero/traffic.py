"""What a rank sends in collectives over parameters and gradients, in bytes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch import Tensor

from llm3d.parallel import collectives


@contextmanager
def counted_traffic() -> Iterator[list[int]]:
    """A list that grows by the bytes that this rank sends in each collective of the block.

    Over n ranks, of a tensor of B bytes in all: reduce-scatter, all-gather and exchange (n - 1) / n B, all-reduce
    twice that, as in a ring.
    """
    sent: list[int] = []

    def counting(collective: Any, whole: int, times: int) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            tensor: Tensor = args[whole]
            n = dist.get_world_size(kwargs["group"])
            sent.append(times * tensor.nbytes * (n - 1) // n)
            return collective(*args, **kwargs)

        return counted

    patches = [
        (dist, "all_reduce", 0, 2),
        (dist, "all_to_all_single", 1, 1),
        (collectives, "_all_gather", 0, 1),
        (collectives, "_reduce_scatter", 1, 1),
    ]
    with ExitStack() as stack:
        for module, name, whole, times in patches:
            replacement = counting(getattr(module, name), whole, times)
            stack.enter_context(mock.patch.object(module, name, replacement))
        yield sent
