"""The matrix products of linear layers, each by the fastest library that PyTorch brings for it.

On a CPU there are two for fp32: BLAS, which torch.mm calls (MKL in PyTorch's wheels for x86, whose code for processors
of other makers is its slower one), and oneDNN. Which is faster depends on the processor and on which of the three
products it is: `faster_by_onednn` finds it out, `take` keeps it. On a GPU, and in bf16, for which PyTorch takes oneDNN
itself, there is torch.mm alone.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import Tensor

from llm3d.kernels.accumulate import accumulate_
from llm3d.kernels.paper import is_cuda

Kind = Literal["forward", "input gradient", "weight gradient"]
KINDS: tuple[Kind, ...] = ("forward", "input gradient", "weight gradient")

MIN_ROWS = 64  # below, as where text is written token by token, no product is worth a second library
MIN_WEIGHTS = 2**18  # of a matrix: the gain on smaller ones is small, and hard to measure
# That noise does not give: a machine is to choose the same each time, so that a run repeats to the bit. oneDNN takes
# half of MKL's time on AMD with AVX-512, and 0.9 to 1.7 of it on AMD with AVX2.
_GAIN = 1.5
_LARGEST_SIDE, _MULTIPLICATIONS, _ROUNDS = 4096, 2**29, 3  # of a product that is timed, and how often it is

_by_onednn = frozenset[Kind]()
_measured: tuple[Kind, ...] | None = None


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [rows, in] weight^T -> [rows, out]."""
    if _by_onednn and _is_by_onednn("forward", x, weight):
        return _onednn(x, weight)
    return x @ weight.t()


def linear_input_gradient(grad_output: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """grad_output [rows, out] weight -> [rows, in], in `out` where it is given."""
    if _by_onednn and _is_by_onednn("input gradient", grad_output, weight):
        product = _onednn(grad_output, weight.t())
        return product if out is None else out.copy_(product)
    return torch.mm(grad_output, weight) if out is None else torch.mm(grad_output, weight, out=out)


def add_linear_weight_gradient_(total: Tensor, grad_output: Tensor, x: Tensor, replace: bool = False) -> None:
    """total [out, in] += grad_output^T x. replace: what total holds counts as zero, whatever it is.

    total: of the dtype of grad_output [rows, out] and x [rows, in], or fp32. The sum is rounded to total's dtype once;
    on a CPU a product in bf16 is rounded to that before it is added.
    """
    transposed, beta = grad_output.t(), 0 if replace else 1
    if _by_onednn and _is_by_onednn("weight gradient", grad_output, total):
        _add(total, _onednn(transposed, x.t()), replace)
    elif grad_output.dtype == total.dtype:
        total.addmm_(transposed, x, beta=beta)
    elif not is_cuda(grad_output):
        _add(total, transposed @ x, replace)
    elif _adds_to_fp32(total.device):
        torch.addmm(total, transposed, x, out_dtype=total.dtype, beta=beta, out=total)
    else:
        _add(total, torch.mm(transposed, x, out_dtype=total.dtype), replace)


def faster_by_onednn(shapes: Iterable[tuple[int, int]]) -> tuple[Kind, ...]:
    """The products that oneDNN computes faster here, on the threads that there are, with weights [out, in].

    Takes some tenths of a second a shape. Measured once a process: a run keeps what it has begun with.
    """
    global _measured
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return ()
    if _measured is None:
        ratios = [_ratios(min(out, _LARGEST_SIDE), min(into, _LARGEST_SIDE)) for out, into in shapes]
        means = {kind: statistics.geometric_mean(each[kind] for each in ratios) for kind in KINDS}
        _measured = tuple(kind for kind in KINDS if means[kind] > _GAIN)
    return _measured


def take(by_onednn: Iterable[Kind]) -> None:
    """Have oneDNN compute these products with large weights from now on, and BLAS the others."""
    global _by_onednn
    _by_onednn = frozenset(by_onednn)


def describe() -> str | None:
    """What oneDNN computes, for people; None: nothing."""
    return ", ".join(kind for kind in KINDS if kind in _by_onednn) or None


def _is_by_onednn(kind: Kind, rows: Tensor, weight: Tensor) -> bool:
    return (
        kind in _by_onednn
        and len(rows) >= MIN_ROWS
        and weight.numel() >= MIN_WEIGHTS
        and rows.dtype == weight.dtype == torch.float32
        and rows.device.type == weight.device.type == "cpu"
    )


def _onednn(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def _add(total: Tensor, product: Tensor, replace: bool) -> None:
    if replace:
        total.copy_(product)
    else:
        accumulate_(total, product)


@functools.cache
def _adds_to_fp32(device: torch.device) -> bool:
    """Whether a product in bf16 can be added to an fp32 sum as it is made, which newer versions of PyTorch can.

    On paper it is not, so that the memory that is planned suffices for any version.
    """
    if device.type == "meta":
        return False
    total, ones = torch.ones(16, 16, device=device), torch.ones(16, 16, device=device, dtype=torch.bfloat16)
    try:
        torch.addmm(total, ones, ones, out_dtype=total.dtype, out=total)
    except (RuntimeError, TypeError):
        return False
    return bool((total == 17).all())


def _ratios(out_features: int, in_features: int) -> dict[Kind, float]:
    """How many times as long as oneDNN BLAS takes for each product with a weight [out, in]."""
    rows = max(MIN_ROWS, min(1024, _MULTIPLICATIONS // (out_features * in_features)))
    x, weight = torch.ones(rows, in_features), torch.ones(out_features, in_features)
    grad_output, total = torch.ones(rows, out_features), torch.zeros_like(weight)
    products: dict[Kind, Callable[[], object]] = {
        "forward": lambda: linear(x, weight),
        "input gradient": lambda: linear_input_gradient(grad_output, weight),
        "weight gradient": lambda: add_linear_weight_gradient_(total, grad_output, x),
    }
    return {kind: _ratio(kind, products[kind]) for kind in KINDS}


def _ratio(kind: Kind, compute: Callable[[], object]) -> float:
    """Of the shortest times of some rounds: what else runs disturbs both alike."""
    before = _by_onednn
    times: dict[bool, list[float]] = {False: [], True: []}
    try:
        for _ in range(1 + _ROUNDS):
            for by_onednn, taken in times.items():
                take((kind,) if by_onednn else ())
                started = time.perf_counter()
                compute()
                taken.append(time.perf_counter() - started)
    finally:
        take(before)
    blas, onednn = (min(taken[1:]) for taken in times.values())
    return blas / onednn
