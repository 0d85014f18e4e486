"""Which library computes a model's matrix products: the same on every rank, for a run is to be repeatable."""

from __future__ import annotations

import json
from collections.abc import Iterable

from torch import Tensor
from torch.distributed import ProcessGroup

from llm3d.kernels import linear
from llm3d.parallel.collectives import gather_bytes


def choose_products(weights: Iterable[Tensor], group: ProcessGroup) -> None:
    """Have the products with all ranks' weights computed as rank 0 finds them fastest. Called on all ranks.

    Only those on a CPU in fp32, of matrices [out, in] that are not small: see `llm3d.kernels.linear`.
    """
    large = (weight for weight in weights if weight.dim() == 2 and weight.numel() >= linear.MIN_WEIGHTS)
    shapes = sorted({(weight.shape[0], weight.shape[1]) for weight in large})
    everyones = [json.loads(theirs) for theirs in gather_bytes(json.dumps(shapes).encode(), group)]
    all_shapes = sorted({(out, into) for theirs in everyones for out, into in theirs})
    if all_shapes:
        kinds = linear.faster_by_onednn(all_shapes) if group.rank() == 0 else ()
        linear.take(json.loads(gather_bytes(json.dumps(kinds).encode(), group)[0]))
